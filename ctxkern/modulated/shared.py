"""What backends with kernels of their own do alike around them."""

from typing import NamedTuple

import torch

from ctxkern.checks import check_bounds, check_index


def contiguous(t):
    return t if t is None or t.is_contiguous() else t.contiguous()


def rounds_to_tf32(dtype):
    """Whether products of `dtype` may be rounded to TF32. Follows `torch.set_float32_matmul_precision` too, whose own
    getter raises where precision was set for a backend."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def check_values(x, context, context_index, cu_seqlens):
    """Of integer tensors on the CPU; on a GPU the kernels check them."""
    if x.device.type != "cpu":
        return
    if context_index is not None:
        check_index(context_index, context.shape[0], "context_index")
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[0])


def outputs(x, bilinears):
    """[y], one a projection, not yet written."""
    return [x.new_empty((*x.shape[:-1], t.shape[1])) for t in bilinears]


def fill_with_biases(outs, biases):
    """What y is without rows or without columns of x."""
    for out, bias in zip(outs, biases, strict=True):
        out.copy_(out.new_zeros(()) if bias is None else bias)


class Gradients(NamedTuple):
    """As `modulated_backward` returns them; None: not asked for."""

    dx: torch.Tensor | None
    dcontext: torch.Tensor | None
    dweights: list
    dbilinears: list
    dbiases: list

    def left(self):
        """Those that kernels are to write."""
        return [t for t in (self.dx, self.dcontext, *self.dweights, *self.dbilinears) if t is not None]


def gradients(douts, x, context, weights, bilinears, needs):
    """The `Gradients` that `needs` (the same five, flat) asks for: dcontext zeros, dbiases done, others to write."""
    n = len(bilinears)
    need_x, need_context, *each = needs
    need_w, need_t, need_b = each[:n], each[n : 2 * n], each[2 * n :]
    leading = tuple(range(x.dim() - 1))
    return Gradients(
        x.new_empty(x.shape) if need_x else None,
        context.new_zeros(context.shape) if need_context else None,
        [torch.empty_like(w) if need else None for w, need in zip(weights, need_w, strict=True)],
        [torch.empty_like(t) if need else None for t, need in zip(bilinears, need_t, strict=True)],
        [dout.sum(leading) if need else None for dout, need in zip(douts, need_b, strict=True)],
    )

"""What a modulated call is given and gives back, and what backends do alike around their kernels.

A backend is a module of this folder with

    forward(operands, workspace_bytes) → [y]                      one per projection, dtype and leading shape of x
    backward(douts, operands, workspace_bytes, needs) → Gradients
    plan(operands, workspace_bytes, backward) → Plan              of one projection

All tensors that reach it are plain (`ctxkern.ops`).
"""

from typing import Any, NamedTuple

import torch

from ctxkern.checks import check_bounds, check_index, is_readable
from ctxkern.plan import rounds_to_tf32 as rounds_to_tf32


class Operands(NamedTuple):
    """x [B, S, D] or packed [N, D], context [F, K] or [B, S, K]; lists with one entry per projection."""

    x: torch.Tensor
    context: torch.Tensor
    weights: list  # [D, E] or None
    bilinears: list  # [D, E, K]
    biases: list  # [E] or None
    context_index: torch.Tensor | None = None  # [B]
    cu_seqlens: torch.Tensor | None = None  # [B + 1]

    def flat(self):
        x, context, weights, bilinears, biases, *spans = self
        return x, context, *weights, *bilinears, *biases, *spans

    @classmethod
    def of(cls, flat):
        """From what `flat` gives."""
        n = (len(flat) - 4) // 3
        w, t, b = 2 + n, 2 + 2 * n, 2 + 3 * n
        return cls(flat[0], flat[1], flat[2:w], flat[w:t], flat[t:b], flat[-2], flat[-1])

    @property
    def per_token(self):
        return self.context.dim() == 3

    @property
    def param_dtype(self):
        """Of the first projection and the context, the wider one."""
        return torch.promote_types(self.bilinears[0].dtype, self.context.dtype)


class Gradients(NamedTuple):
    """One entry per operand that has a gradient: None where it is not asked for. As `needs`: whether it is."""

    x: Any
    context: Any
    weights: list
    bilinears: list
    biases: list

    @classmethod
    def of(cls, flat):
        """From (x, context, *weights, *bilinears, *biases)."""
        n = (len(flat) - 2) // 3
        w, t = 2 + n, 2 + 2 * n
        return cls(flat[0], flat[1], flat[2:w], flat[w:t], flat[t:])

    def flat(self):
        return self.x, self.context, *self.weights, *self.bilinears, *self.biases

    def from_kernels(self):
        """Those that kernels write."""
        return [t for t in (self.x, self.context, *self.weights, *self.bilinears) if t is not None]


def contiguous(t):
    return t if t is None or t.is_contiguous() else t.contiguous()


def check_values(operands):
    """Of integer tensors on the CPU; on a GPU the kernels check them."""
    if operands.context_index is not None and is_readable(operands.context_index):
        check_index(operands.context_index, operands.context.shape[0], "context_index")
    if operands.cu_seqlens is not None and is_readable(operands.cu_seqlens):
        check_bounds(operands.cu_seqlens, operands.x.shape[0])


def new_outputs(operands):
    """[y], one per projection, not yet written."""
    x = operands.x
    *leading, _ = x.shape
    return [x.new_empty((*leading, t.shape[1])) for t in operands.bilinears]


def fill_with_biases(outs, biases):
    """What y is without rows or without columns of x."""
    for out, bias in zip(outs, biases, strict=True):
        out.copy_(out.new_zeros(()) if bias is None else bias)


def bias_gradients(douts, operands, needs):
    """[dbias] in the dtype of each bias; None where it is not asked for."""
    leading = (0, 1) if operands.x.dim() == 3 else (0,)
    return [
        dout.sum(leading).to(bias.dtype) if need else None
        for dout, bias, need in zip(douts, operands.biases, needs.biases, strict=True)
    ]


def new_gradients(douts, operands, needs):
    """The `Gradients` that `needs` asks for: biases done, the others not yet written; of x and context without gaps."""
    like, dense = torch.empty_like, torch.contiguous_format
    return Gradients(
        like(operands.x, memory_format=dense) if needs.x else None,
        like(operands.context, memory_format=dense) if needs.context else None,
        [like(w) if need else None for w, need in zip(operands.weights, needs.weights, strict=True)],
        [like(t) if need else None for t, need in zip(operands.bilinears, needs.bilinears, strict=True)],
        bias_gradients(douts, operands, needs) if any(needs.biases) else [None] * len(needs.biases),
    )

"""The modulated operators as torch.library knows them: schema, fake, FLOPs and what autograd calls."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ctxkern.ops import (
    Family,
    Options,
    call,
    check_values,
    contiguous,
    differentiable,
    flop_formula,
    is_plain,
    isolated,
    like,
    needed,
    operator,
)
from ctxkern.reference import modulated_linear_ref
from ctxkern.registry import implementation

from .operands import Gradients, Operands


def _modulated_fake(x, context, weights, bilinears, *_):
    return [x.new_empty((*x.shape[:-1], t.shape[1])) for t in bilinears]


@operator(
    "modulated_forward(Tensor x, Tensor context, Tensor?[] weights, Tensor[] bilinears, Tensor?[] biases, "
    "Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str? backend) -> Tensor[]",
    _modulated_fake,
)
def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend):
    """y of each projection."""
    operands = Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    return isolated(_run, operands, Options(workspace_bytes, backend))


def _run(operands, options):
    return implementation("modulated", options.backend, operands.x).forward(operands, options.workspace_bytes)


def _modulated_backward_fake(douts, x, context, weights, bilinears, biases, _index, _cu, _workspace, _backend, needs):
    layouts = [contiguous] * 2 + [like] * (2 * len(bilinears)) + [contiguous] * len(biases)
    inputs = (x, context, *weights, *bilinears, *biases)
    return [layout(t) for layout, t, need in zip(layouts, inputs, needs, strict=True) if need]


@operator(
    "modulated_backward(Tensor[] douts, Tensor x, Tensor context, Tensor?[] weights, Tensor[] bilinears, "
    "Tensor?[] biases, Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str? backend, bool[] needs) "
    "-> Tensor[]",
    _modulated_backward_fake,
)
def modulated_backward(
    douts, x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend, needs
):
    """The gradients that `needs` asks for, of (x, context, *weights, *bilinears, *biases) in this order."""
    operands = Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    return needed(isolated(_run_backward, operands, Options(workspace_bytes, backend), douts, needs), needs)


def _run_backward(operands, options, douts, needs):
    module = implementation("modulated", options.backend, operands.x)
    return module.backward(douts, operands, options.workspace_bytes, Gradients.of(needs)).flat()


def _modulated_flops(x, context, bilinears, index):
    """Operations of the forward, shapes for tensors: that of the panel form, or of a context per token."""
    tokens = torch.Size(x[:-1]).numel()
    per_token = len(context) == 3
    contexts = tokens if per_token else context[0] if index is None else min(index[0], context[0])
    made = sum(2 * contexts * d_in * d_out * context_dim for d_in, d_out, context_dim in bilinears)
    return made + sum(2 * tokens * d_in * d_out for d_in, d_out, _ in bilinears)


@flop_formula("modulated_forward")
def _modulated_forward_flops(x, context, weights, bilinears, biases, index, *_, out_shape=None, **__):
    return _modulated_flops(x, context, bilinears, index)


@flop_formula("modulated_backward")
def _modulated_backward_flops(douts, x, context, weights, bilinears, biases, index, *_, out_shape=None, **__):
    return 2 * _modulated_flops(x, context, bilinears, index)


def _forward(operands, options):
    return modulated_forward(*operands, *options)


def _backward(operands, options, douts, needs):
    return modulated_backward(list(douts), *operands, *options, list(needs))


def _reference(operands, _options):
    x, context, weights, bilinears, biases, context_index, cu_seqlens = operands
    check_values(x, context, context_index, cu_seqlens)
    return tuple(
        modulated_linear_ref(x, context, w, t, b, context_index=context_index, cu_seqlens=cu_seqlens)
        for w, t, b in zip(weights, bilinears, biases, strict=True)
    )


FAMILY = Family(Operands, _run, _run_backward, _forward, _backward, _reference, constants=2)
_function = differentiable(FAMILY)


def modulated(operands, workspace_bytes, backend, seen=False):
    """A tuple of outputs, one per projection. seen: as in `ops.call`."""
    return call(FAMILY, _function, operands, Options(workspace_bytes, backend), seen)


def with_memory(operands):
    """Modulated operands on whose pointers a plan can rely: fake tensors become tensors with memory that nothing
    touches, an index that names as many rows as it can, and even bounds."""
    if operands.x.device.type not in ("cpu", "cuda") or all(t is None or is_plain(t) for t in operands.flat()):
        return operands
    with _disable_current_modes():
        x, context, weights, bilinears, biases, index, bounds = operands

        def like(t):
            return t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)

        if index is not None and not is_plain(index):
            index = torch.arange(len(index), device=x.device) % max(len(context), 1)
        if bounds is not None and not is_plain(bounds):
            bounds = torch.linspace(0, len(x), len(bounds), device=x.device).to(torch.int32)
        each = (list(map(like, tensors)) for tensors in (weights, bilinears, biases))
        return Operands(like(x), like(context), *each, index, bounds)

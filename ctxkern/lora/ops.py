"""The low-rank operators as torch.library knows them: schema, fake, FLOPs and what autograd calls."""

from typing import NamedTuple

import torch

from ctxkern.ops import (
    Family,
    call,
    check_values,
    contiguous,
    differentiable,
    direct,
    flop_formula,
    isolated,
    like,
    needed,
    operator,
    spread,
)
from ctxkern.reference import lora_linear_ref
from ctxkern.registry import implementation

from .operands import Gradients, Operands


class Options(NamedTuple):
    """Of a call, what is no tensor."""

    workspace_bytes: int
    backend: str | None
    scale: float


def _lora_fake(x, weight, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[1]))


@operator(
    "lora_forward(Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str? backend) -> Tensor",
    _lora_fake,
)
def lora_forward(x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend):
    """y of a linear layer with an adapter per sequence."""
    operands = Operands(x, weight, A, B, bias, adapter_index, cu_seqlens)
    return isolated(_run, operands, scale, workspace_bytes, backend)


def _run(operands, scale, workspace_bytes, backend):
    return implementation("lora", backend, operands.x).forward(operands, scale, workspace_bytes)


def _lora_backward_fake(dout, x, weight, A, B, bias, _index, _cu, _scale, _workspace, _backend, needs):
    layouts = (contiguous, like, contiguous, contiguous, contiguous)
    return [layout(t) for layout, t, need in zip(layouts, (x, weight, A, B, bias), needs, strict=True) if need]


@operator(
    "lora_backward(Tensor dout, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str? backend, bool[] needs) -> Tensor[]",
    _lora_backward_fake,
)
def lora_backward(dout, x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend, needs):
    """The gradients that `needs` asks for, of (x, weight, A, B, bias) in this order."""
    operands = Operands(x, weight, A, B, bias, adapter_index, cu_seqlens)
    return needed(isolated(_run_backward, operands, dout, scale, workspace_bytes, backend, needs), needs)


def _run_backward(operands, dout, scale, workspace_bytes, backend, needs):
    module = implementation("lora", backend, operands.x)
    return module.backward(dout, operands, scale, workspace_bytes, Gradients.of(needs))


def _lora_flops(x, weight, A, B):
    tokens, rank = torch.Size(x[:-1]).numel(), A[1]
    return 2 * tokens * (rank * (A[2] + B[1]) + (0 if weight is None else weight[0] * weight[1]))


@flop_formula("lora_forward")
def _lora_forward_flops(x, weight, A, B, *_, out_shape=None, **__):
    return _lora_flops(x, weight, A, B)


@flop_formula("lora_backward")
def _lora_backward_flops(dout, x, weight, A, B, *_, out_shape=None, **__):
    return 2 * _lora_flops(x, weight, A, B)


def _forward(operands, flat, options):
    workspace_bytes, backend, scale = options
    if direct(flat):
        return (isolated(_run, operands, scale, workspace_bytes, backend),)
    return (lora_forward(*operands, scale, workspace_bytes, backend),)


def _backward(douts, flat, options, needs):
    workspace_bytes, backend, scale = options
    operands = Operands.of(flat)
    if direct(flat) and direct(douts):
        return isolated(_run_backward, operands, douts[0], scale, workspace_bytes, backend, needs)
    return spread(lora_backward(douts[0], *operands, scale, workspace_bytes, backend, list(needs)), needs)


def _reference(operands, options):
    x, weight, A, B, bias, adapter_index, cu_seqlens = operands
    check_values(x, A, adapter_index, cu_seqlens, "adapter_index")
    spans = {"adapter_index": adapter_index, "cu_seqlens": cu_seqlens}
    return (lora_linear_ref(x, weight, A, B, options.scale, bias, **spans),)


FAMILY = Family(Operands, _forward, _backward, _reference)
_function = differentiable(FAMILY)


def lora(operands, scale, workspace_bytes, backend):
    """The output of a linear layer with an adapter per sequence."""
    return call(FAMILY, _function, operands, Options(workspace_bytes, backend, scale))[0]

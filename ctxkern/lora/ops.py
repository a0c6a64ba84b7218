"""The low-rank operators as torch.library knows them: schema, fake, FLOPs and what autograd calls."""

import torch

from ctxkern.checks import check_ranks
from ctxkern.ops import (
    Family,
    call,
    check_values,
    contiguous,
    differentiable,
    flop_formula,
    isolated,
    like,
    needed,
    operator,
    readable,
)
from ctxkern.reference import lora_linear_ref
from ctxkern.registry import implementation

from .operands import CONSTANTS, Gradients, Operands, Options

_TENSORS = (
    "Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? scales, Tensor? ranks, Tensor? seed, "
    "Tensor? adapter_index, Tensor? cu_seqlens, int workspace_bytes, str? backend, float scale, float dropout"
)


def _lora_fake(x, weight, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[1]))


@operator(f"lora_forward({_TENSORS}) -> Tensor", _lora_fake)
def lora_forward(*args):
    """y of a linear layer with an adapter per sequence."""
    operands, options = Operands(*args[:-4]), Options(*args[-4:])
    return isolated(_run, operands, options)[0]


def _run(operands, options):
    return (implementation("lora", options.backend, operands.x).forward(operands, options),)


def _lora_backward_fake(dout, x, weight, A, B, bias, *others):
    layouts = (contiguous, like, contiguous, contiguous, contiguous)
    return [layout(t) for layout, t, need in zip(layouts, (x, weight, A, B, bias), others[-1], strict=True) if need]


@operator(f"lora_backward(Tensor dout, {_TENSORS}, bool[] needs) -> Tensor[]", _lora_backward_fake)
def lora_backward(dout, *args):
    """The gradients that `needs` asks for, of (x, weight, A, B, bias) in this order."""
    operands, options, needs = Operands(*args[:-5]), Options(*args[-5:-1]), args[-1]
    return needed(isolated(_run_backward, operands, options, (dout,), needs), needs)


def _run_backward(operands, options, douts, needs):
    module = implementation("lora", options.backend, operands.x)
    return module.backward(*douts, operands, options, Gradients.of(needs))


def _lora_flops(x, weight, A, B):
    tokens, rank = torch.Size(x[:-1]).numel(), A[1]
    return 2 * tokens * (rank * (A[2] + B[1]) + (0 if weight is None else weight[0] * weight[1]))


@flop_formula("lora_forward")
def _lora_forward_flops(x, weight, A, B, *_, out_shape=None, **__):
    return _lora_flops(x, weight, A, B)


@flop_formula("lora_backward")
def _lora_backward_flops(dout, x, weight, A, B, *_, out_shape=None, **__):
    return 2 * _lora_flops(x, weight, A, B)


def _forward(operands, options):
    return (lora_forward(*operands, *options),)


def _backward(operands, options, douts, needs):
    return lora_backward(*douts, *operands, *options, list(needs))


def _reference(operands, options):
    x, weight, A, B, bias, scales, ranks, seed, adapter_index, cu_seqlens = operands
    check_values(x, A, adapter_index, cu_seqlens, "adapter_index", -1)
    known = None if torch.compiler.is_compiling() else readable(ranks)
    if known is not None:
        check_ranks(known, A.shape[1])
    scale = options.scale if scales is None else scales * options.scale
    spans = {"adapter_index": adapter_index, "cu_seqlens": cu_seqlens}
    dropout = {"dropout": options.dropout, "seed": seed}
    return (lora_linear_ref(x, weight, A, B, scale, bias, ranks=ranks, **spans, **dropout),)


FAMILY = Family(Operands, _run, _run_backward, _forward, _backward, _reference, CONSTANTS)
_function = differentiable(FAMILY)


def lora(operands, options, seen=False):
    """The output of a linear layer with an adapter per sequence. seen: as in `ops.call`."""
    return call(FAMILY, _function, operands, options, seen)[0]

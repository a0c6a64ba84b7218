"""The factored operators as torch.library knows them: schema, fake, FLOPs and what autograd calls."""

import torch

from ctxkern.ops import (
    Family,
    Options,
    call,
    check_values,
    contiguous,
    differentiable,
    flop_formula,
    isolated,
    needed,
    operator,
)
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.registry import implementation

from .operands import Gradients, Operands

_TENSORS = (
    "Tensor x, Tensor context, Tensor? weight, Tensor in_factor, Tensor context_factor, Tensor out_factor, "
    "Tensor? bias, Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str? backend"
)


def _factored_fake(x, context, weight, in_factor, context_factor, out_factor, *_):
    return x.new_empty((*x.shape[:-1], out_factor.shape[1]))


@operator(f"factored_forward({_TENSORS}) -> Tensor", _factored_fake)
def factored_forward(*args):
    """y of a linear layer whose weight is gated by a context."""
    return isolated(_run, Operands(*args[:-2]), Options(*args[-2:]))[0]


def _run(operands, options):
    return (implementation("factored", options.backend, operands.x).forward(operands, options),)


def _factored_backward_fake(dout, x, context, weight, in_factor, context_factor, out_factor, bias, *others):
    inputs = (x, context, weight, in_factor, context_factor, out_factor, bias)
    return [contiguous(t) for t, need in zip(inputs, others[-1], strict=True) if need]


@operator(f"factored_backward(Tensor dout, {_TENSORS}, bool[] needs) -> Tensor[]", _factored_backward_fake)
def factored_backward(dout, *args):
    """The gradients that `needs` asks for, of (x, context, weight, in_factor, context_factor, out_factor, bias) in this
    order."""
    operands, options, needs = Operands(*args[:-3]), Options(*args[-3:-1]), args[-1]
    return needed(isolated(_run_backward, operands, options, (dout,), needs), needs)


def _run_backward(operands, options, douts, needs):
    module = implementation("factored", options.backend, operands.x)
    grads = module.backward(*douts, operands, options, Gradients.of(needs))
    return [t if t is None else t.contiguous() for t in grads]


def _factored_flops(x, context, weight, in_factor, out_factor):
    tokens, (d_in, rank), d_out = torch.Size(x[:-1]).numel(), in_factor, out_factor[1]
    gates = torch.Size(context).numel() * rank
    return 2 * (tokens * (rank * (d_in + d_out) + (0 if weight is None else d_in * d_out)) + gates)


@flop_formula("factored_forward")
def _factored_forward_flops(x, context, weight, in_factor, context_factor, out_factor, *_, out_shape=None, **__):
    return _factored_flops(x, context, weight, in_factor, out_factor)


@flop_formula("factored_backward")
def _factored_backward_flops(dout, x, context, weight, in_factor, context_factor, out_factor, *_, out_shape=None, **__):
    return 2 * _factored_flops(x, context, weight, in_factor, out_factor)


def _forward(operands, options):
    return (factored_forward(*operands, *options),)


def _backward(operands, options, douts, needs):
    return factored_backward(*douts, *operands, *options, list(needs))


def _reference(operands, _options):
    *tensors, context_index, cu_seqlens = operands
    check_values(operands.x, operands.context, context_index, cu_seqlens)
    return (factored_modulated_linear_ref(*tensors, context_index=context_index, cu_seqlens=cu_seqlens),)


FAMILY = Family(Operands, _run, _run_backward, _forward, _backward, _reference, constants=2)
_function = differentiable(FAMILY)


def factored(operands, options, seen=False):
    """The output of a linear layer whose weight is gated by a context. seen: as in `ops.call`."""
    return call(FAMILY, _function, operands, options, seen)[0]

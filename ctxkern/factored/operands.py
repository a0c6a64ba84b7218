"""What a factored call is given and gives back, and what its backends do alike.

A backend is a module of this folder with

    forward(operands, options) → y                      dtype and leading shape of x
    backward(dout, operands, options, needs) → Gradients

All tensors that reach it are plain (`ctxkern.ops`). Kernels are those of `ctxkern.lora` with one adapter, whose inner
products are multiplied by a row of gates: context context_factor.
"""

from typing import Any, NamedTuple

import torch

from ctxkern.checks import check_bounds, check_index, is_readable
from ctxkern.dtypes import accumulator
from ctxkern.lora.operands import Gates
from ctxkern.lora.operands import Gradients as LoraGradients
from ctxkern.lora.operands import Operands as LoraOperands
from ctxkern.lora.operands import Options as LoraOptions
from ctxkern.modulated.operands import contiguous


class Operands(NamedTuple):
    """x [B, S, D] or packed [N, D]; context [F, K] or [B, S, K]; weight [D, E] or None; in_factor [D, R];
    context_factor [K, R]; out_factor [R, E]; bias [E] or None."""

    x: torch.Tensor
    context: torch.Tensor
    weight: torch.Tensor | None
    in_factor: torch.Tensor
    context_factor: torch.Tensor
    out_factor: torch.Tensor
    bias: torch.Tensor | None
    context_index: torch.Tensor | None = None  # [B] int64
    cu_seqlens: torch.Tensor | None = None  # [B + 1]

    def flat(self):
        return tuple(self)

    @classmethod
    def of(cls, flat):
        return cls(*flat)

    @property
    def per_token(self):
        return self.context.dim() == 3


class Gradients(NamedTuple):
    """One entry per operand that has a gradient. As `needs`: whether it is asked for. Absent ones are None."""

    x: Any
    context: Any
    weight: Any
    in_factor: Any
    context_factor: Any
    out_factor: Any
    bias: Any

    @classmethod
    def of(cls, flat):
        return cls(*flat)

    def flat(self):
        return tuple(self)


def _wide(operands):
    """The dtype in which context and context_factor meet."""
    x, context, context_factor = operands.x, operands.context, operands.context_factor
    return torch.promote_types(torch.promote_types(context_factor.dtype, context.dtype), x.dtype)


def gates(operands):
    """context context_factor, [F, R] or [N, R], in the dtype of sums; on a CPU integer operands are checked."""
    if operands.x.device.type == "cpu":
        check_values(operands)
    context, wide = operands.context.flatten(0, -2), _wide(operands)
    return (context.to(wide) @ operands.context_factor.to(wide)).to(accumulator(operands.x.dtype))


def gate_rows(operands):
    """[N] int64, the row of the gates of each row of x; None where there is one per token."""
    x, index, bounds = operands.x, operands.context_index, operands.cu_seqlens
    if operands.per_token:
        return None
    if bounds is None:
        each = torch.arange(len(x), device=x.device) if index is None else index
        return each.unsqueeze(1).expand(-1, x.shape[1]).flatten()
    token = torch.arange(len(x), dtype=torch.int32, device=x.device)
    sequence = torch.bucketize(token, bounds[1:], right=True)
    return sequence if index is None else index[sequence]


def _gates(operands, values, products, together):
    index, bounds = operands.context_index, operands.cu_seqlens
    if not together or operands.per_token:
        return Gates(values, gate_rows(operands), products)
    length = operands.x.shape[1] if bounds is None else 1
    return Gates(values, contiguous(index), products, length, contiguous(bounds))


def context_gradients(products, operands, needs):
    """Those of context and context_factor that `needs` asks for, from those of the gates of each row of x [N, R]."""
    context, wide = operands.context, _wide(operands)
    each = _by_context(products, operands).to(wide)
    dcontext = each @ operands.context_factor.to(wide).mT if needs.context else None
    dfactor = context.flatten(0, -2).to(wide).mT @ each if needs.context_factor else None
    return (
        None if dcontext is None else dcontext.to(context.dtype).view(context.shape),
        None if dfactor is None else dfactor.to(operands.context_factor.dtype),
    )


def _by_context(products, operands):
    """Sums of products over the rows of x of each row of the gates, in a fixed order."""
    x, index, bounds = operands.x, operands.context_index, operands.cu_seqlens
    if operands.per_token:
        return products
    if bounds is None:
        each = products.view(*x.shape[:2], products.shape[1]).sum(1)
    else:
        each = torch.segment_reduce(products, "sum", offsets=bounds.long(), initial=0)
    if index is None:
        return each
    total = products.new_zeros(len(operands.context), products.shape[1])
    if x.device.type == "cpu":
        return total.index_add_(0, index, each)
    # index_add_ is atomic on a GPU; this one sorts
    return total.index_put_((index,), each, accumulate=True)


def check_values(operands):
    """Of integer tensors on the CPU."""
    if operands.context_index is not None and is_readable(operands.context_index):
        check_index(operands.context_index, len(operands.context), "context_index")
    if operands.cu_seqlens is not None and is_readable(operands.cu_seqlens):
        check_bounds(operands.cu_seqlens, len(operands.x))


class _Call(NamedTuple):
    """A factored call as one of the low-rank family, of one adapter for all rows."""

    operands: LoraOperands
    options: LoraOptions
    gates: Gates


def _as_lora(operands, options, gates, together, products=None):
    x, _, weight, in_factor, _, out_factor, bias = operands[:7]
    values = gates(operands)
    transposed = None if weight is None else weight.mT
    lora = LoraOperands(
        x.reshape(1, x.shape[:-1].numel(), x.shape[-1]), transposed, in_factor.mT[None], out_factor.mT[None], bias
    )
    options = LoraOptions(options.workspace_bytes, options.backend, 1.0, 0.0)
    return _Call(lora, options, _gates(operands, values, products, together))


def lora_forward(backend, operands, options, gates=gates, together=False):
    """y by the forward of a low-rank backend. gates: what makes them, of operands whose values are in range; together:
    whether it takes `Gates.length` and `Gates.bounds`."""
    y = backend.forward(*_as_lora(operands, options, gates, together))
    return y.view(*operands.x.shape[:-1], y.shape[-1])


def lora_backward(
    backend, dout, operands, options, needs, gates=gates, context_gradients=context_gradients, together=False
):
    """The `Gradients` that `needs` asks for, by the backward of a low-rank backend; likewise."""
    x, tokens = operands.x, operands.x.shape[:-1].numel()
    asked, products = needs.context or needs.context_factor, None
    if asked:
        products = x.new_empty((tokens, operands.out_factor.shape[0]), dtype=accumulator(x.dtype))
    call = _as_lora(operands, options, gates, together, products)
    wanted = LoraGradients(needs.x, needs.weight, needs.in_factor, needs.out_factor, needs.bias)
    given = backend.backward(dout.reshape(1, tokens, dout.shape[-1]), call.operands, call.options, wanted, call.gates)
    dcontext, dfactor = context_gradients(products, operands, needs) if asked else (None, None)
    return Gradients(
        None if given.x is None else given.x.view(x.shape),
        dcontext,
        None if given.weight is None else given.weight.mT,
        None if given.A is None else given.A[0].mT,
        dfactor,
        None if given.B is None else given.B[0].mT,
        given.bias,
    )

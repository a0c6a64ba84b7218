"""y = x weight + ((x in_factor) ∘ gate) out_factor + bias in plain PyTorch; temporaries are O(N·(R + D + E)).

gate = context context_factor. Backward, with u = x in_factor and v = dy out_factor^T: dgate sums u ∘ v over the rows of
a context, dcontext = dgate context_factor^T, dcontext_factor = context^T dgate, dx = dy weight^T + (v ∘ gate)
in_factor^T, din_factor = x^T (v ∘ gate), dout_factor = (u ∘ gate)^T dy.
"""

import torch

from ctxkern.factored.operands import Gradients, context_gradients, gate_rows, gates
from ctxkern.lora.base import base_gradients, base_product
from ctxkern.plan import compute_dtype


class _Rows:
    """x [N, D], the factors and the gates of its rows, in the dtype of products."""

    def __init__(self, operands):
        x, in_factor, out_factor = operands.x, operands.in_factor, operands.out_factor
        compute = compute_dtype(x.device.type, x.dtype)
        if x.device.type == "cpu":
            # gradients of wider factors are as wide, and would show what was rounded on the way
            compute = torch.promote_types(compute, in_factor.dtype)
        self.x = x.flatten(0, -2).to(compute)
        self.in_factor, self.out_factor = in_factor.to(compute), out_factor.to(compute)
        flat, rows = gates(operands), gate_rows(operands)
        self.gate = flat if rows is None else flat[rows]

    def gated(self, t):
        return (t * self.gate).to(t.dtype)


def forward(operands, options):
    """y in the dtype of x and the leading shape of x."""
    x, weight, bias = operands.x, operands.weight, operands.bias
    rows = _Rows(operands)
    low = rows.gated(rows.x @ rows.in_factor)
    if weight is not None:
        y = base_product(x.flatten(0, -2), weight.mT, bias, options.workspace_bytes).to(low.dtype)
        y.addmm_(low, rows.out_factor)
    else:
        y = low @ rows.out_factor
        if bias is not None:
            y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def backward(dout, operands, options, needs):
    """The `Gradients` that `needs` asks for."""
    x, _, weight, in_factor, _, out_factor, bias = operands[:7]
    rows, flat, dy = _Rows(operands), x.flatten(0, -2), dout.flatten(0, -2)
    wanted = needs._replace(weight=needs.weight and weight is not None)
    dx, dweight, dbias = base_gradients(
        flat, dy, None if weight is None else weight.mT, bias, wanted, options.workspace_bytes
    )
    wide = dy.to(rows.x.dtype)
    asked = needs.context or needs.context_factor
    v = wide @ rows.out_factor.mT if needs.x or asked or needs.in_factor else None
    u = rows.x @ rows.in_factor if asked or needs.out_factor else None
    dcontext, dfactor = None, None
    if asked:
        dcontext, dfactor = context_gradients(u.to(rows.gate.dtype) * v, operands, needs)
    g = None if v is None else rows.gated(v)
    if needs.x:
        low = g @ rows.in_factor.mT
        dx = (low if dx is None else low.add_(dx)).to(x.dtype).view(x.shape)
    return Gradients(
        dx,
        dcontext,
        None if dweight is None else dweight.mT,
        (rows.x.mT @ g).to(in_factor.dtype) if needs.in_factor else None,
        dfactor,
        (rows.gated(u).mT @ wide).to(out_factor.dtype) if needs.out_factor else None,
        dbias,
    )

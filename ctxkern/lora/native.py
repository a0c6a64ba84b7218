"""What the backends cpu and cuda share: the product with the base weight around their kernels.

run(operands, rows, gradients, gates, adds, scale, kept_from) calls those of a backend. rows: y, or dy beside gradients
(dx, dA, dB); kept_from: draws of 32 bits from there on are kept by dropout, 0 without it. own: as in `base`.
"""

from ctxkern.lora.operands import Gradients, new_gradients, new_output, without_gaps


def forward(operands, options, gates, run, own=None):
    """y in the dtype of x and the leading shape of x."""
    operands = without_gaps(operands)
    y, adds = new_output(operands, options.workspace_bytes, own)
    run(operands, y, None, gates, adds, options.scale, round(options.dropout * 2**32))
    return y.view(*operands.x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates, run, own=None):
    """The `Gradients` that `needs` asks for."""
    operands, dout = without_gaps(operands), dout.contiguous()
    x, _, A, B, _ = operands[:5]
    dx, adds, dweight, dbias = new_gradients(dout.flatten(0, -2), operands, needs, options.workspace_bytes, own)
    dA = A.new_empty(A.shape) if needs.A else None
    dB = B.new_empty(B.shape) if needs.B else None
    if needs.x or needs.A or needs.B or (gates is not None and gates.products is not None):
        run(operands, dout, (dx, dA, dB), gates, adds, options.scale, round(options.dropout * 2**32))
    return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)

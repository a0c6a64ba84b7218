"""What the backends cpu and cuda share: torch's product with the base weight around their kernels.

run(operands, rows, gradients, gates, adds, scale, kept_from) calls those of a backend. rows: y, or dy beside gradients
(dx, dA, dB); kept_from: draws of 32 bits from there on are kept by dropout, 0 without it.
"""

from ctxkern.lora.operands import Gradients, new_gradients, new_output, without_gaps


def _kept_from(options):
    return round(options.dropout * 2**32) if options.dropout else 0


def forward(operands, options, gates, run):
    """y in the dtype of x and the leading shape of x."""
    operands = without_gaps(operands)
    y, adds = new_output(operands, options.workspace_bytes)
    run(operands, y, None, gates, adds, options.scale, _kept_from(options))
    return y.view(*operands.x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates, run):
    """The `Gradients` that `needs` asks for."""
    operands, dout = without_gaps(operands), dout.contiguous()
    x, _, A, B, _ = operands[:5]
    dx, adds, dweight, dbias = new_gradients(dout.flatten(0, -2), operands, needs, options.workspace_bytes)
    dA, dB = (t.new_empty(t.shape) if need else None for t, need in ((A, needs.A), (B, needs.B)))
    if needs.x or needs.A or needs.B or (gates is not None and gates.products is not None):
        run(operands, dout, (dx, dA, dB), gates, adds, options.scale, _kept_from(options))
    return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)

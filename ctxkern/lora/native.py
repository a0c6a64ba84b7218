"""What the backends cpu and cuda share: the struct that their kernels read, and torch's product with the base weight.

run(problem, backward, operands) calls the kernels of a backend.
"""

from ctxkern.lora.operands import Gradients, new_gradients, new_output, without_gaps
from ctxkern.runtime.fill import fill, fill_batch, fill_cube
from ctxkern.runtime.problem import LoraProblem


def _problem(operands, options, rows, adds, gates):
    """The `LoraProblem` of operands without gaps; it keeps no tensor alive. rows: y, or dy in a backward."""
    q, x = LoraProblem(), operands.x
    fill_batch(q.batch, x.shape, operands.A.shape[0], operands.adapter_index, operands.cu_seqlens)
    fill(q.x, x)
    fill_cube(q.A, operands.A)
    fill_cube(q.B, operands.B)
    q.rows, q.adds = rows.data_ptr(), adds
    q.d_in, q.d_out, q.rank = x.shape[-1], operands.B.shape[1], operands.A.shape[1]
    q.scale = options.scale
    if operands.ranks is not None:
        q.ranks = operands.ranks.data_ptr()
    if operands.scales is not None:
        q.scales = operands.scales.data_ptr()
    if options.dropout:
        q.kept_from, q.seed = round(options.dropout * 2**32), operands.seed.data_ptr()
    if gates is not None:
        q.gates, q.gate_rows = gates.values.data_ptr(), len(gates.values)
        q.gate_of, q.products = (0 if t is None else t.data_ptr() for t in gates[1:])
    return q


def forward(operands, options, gates, run):
    """y in the dtype of x and the leading shape of x."""
    operands = without_gaps(operands)
    y, adds = new_output(operands, options.workspace_bytes)
    run(_problem(operands, options, y, adds, gates), False, operands)
    return y.view(*operands.x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates, run):
    """The `Gradients` that `needs` asks for."""
    operands, dout = without_gaps(operands), dout.contiguous()
    x, _, A, B, _ = operands[:5]
    dx, adds, dweight, dbias = new_gradients(dout.flatten(0, -2), operands, needs, options.workspace_bytes)
    dA, dB = (t.new_empty(t.shape) if need else None for t, need in ((A, needs.A), (B, needs.B)))
    if needs.x or needs.A or needs.B or (gates is not None and gates.products is not None):
        q = _problem(operands, options, dout, adds, gates)
        q.dx, q.dA, q.dB = (0 if t is None else t.data_ptr() for t in (dx, dA, dB))
        run(q, True, operands)
    return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)

"""What the backends cpu and cuda share: the struct that their kernels read, and torch's product with the base weight.

run(problem, backward, operands) calls the kernels of a backend.
"""

from ctxkern.lora.operands import Gradients, base_gradients, base_product
from ctxkern.runtime.fill import fill, fill_batch, fill_cube
from ctxkern.runtime.problem import LoraProblem


def _contiguous(t):
    return t if t is None or t.is_contiguous() else t.contiguous()


def _without_gaps(operands):
    """The same with what kernels read row by row made contiguous; weight, A and B stay as they lie."""
    x, weight, A, B, bias, *constants = operands
    return type(operands)(_contiguous(x), weight, A, B, bias, *map(_contiguous, constants))


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
    operands = _without_gaps(operands)
    x, weight, bias = operands[0], operands[1], operands[4]
    flat = x.flatten(0, -2)
    adds = True
    if weight is not None:
        y = base_product(flat, weight, bias, options.workspace_bytes)
    elif bias is not None:
        y = bias.to(x.dtype).expand(len(flat), -1).contiguous()
    elif operands.adapter_index is not None:
        y = x.new_zeros(len(flat), operands.B.shape[1])
    else:
        y, adds = x.new_empty(len(flat), operands.B.shape[1]), False
    run(_problem(operands, options, y, adds, gates), False, operands)
    return y.view(*x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates, run):
    """The `Gradients` that `needs` asks for."""
    operands, dout = _without_gaps(operands), dout.contiguous()
    x, weight, A, B, bias = operands[:5]
    flat, dy = x.flatten(0, -2), dout.flatten(0, -2)
    dx, dweight, dbias = base_gradients(flat, dy, weight, bias, needs, options.workspace_bytes)
    adds = dx is not None
    if needs.x and not adds:
        adds = operands.adapter_index is not None
        dx = flat.new_zeros(flat.shape) if adds else flat.new_empty(flat.shape)
    dA, dB = (t.new_empty(t.shape) if need else None for t, need in ((A, needs.A), (B, needs.B)))
    if needs.x or needs.A or needs.B or (gates is not None and gates.products is not None):
        q = _problem(operands, options, dout, adds, gates)
        q.dx, q.dA, q.dB = (0 if t is None else t.data_ptr() for t in (dx, dA, dB))
        run(q, True, operands)
    return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)

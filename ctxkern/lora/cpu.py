"""C++ kernels on the CPU (csrc/cpu/lora) around torch's own product with the base weight."""

from ctypes import addressof

import torch

from ctxkern.lora.operands import Gradients, check_values, new_gradients, new_output, without_gaps
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime.fill import fill, fill_batch, fill_cube
from ctxkern.runtime.problem import LoraProblem


def _allocate(size):
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _problem(operands, options, rows, adds, gates):
    q, x = LoraProblem(), operands.x
    fill_batch(q.batch, x.shape, operands.A.shape[0], operands.adapter_index, operands.cu_seqlens)
    fill(q.x, x)
    fill_cube(q.A, operands.A)
    fill_cube(q.B, operands.B)
    q.rows, q.adds = rows.data_ptr(), adds
    q.d_in, q.d_out, q.rank = x.shape[-1], operands.B.shape[1], operands.A.shape[1]
    q.threads, q.scale = torch.get_num_threads(), options.scale
    if operands.ranks is not None:
        q.ranks = operands.ranks.data_ptr()
    if operands.scales is not None:
        q.scales = operands.scales.data_ptr()
    if options.dropout:
        q.kept_from, q.seed = round(options.dropout * 2**32), int(operands.seed)
    if gates is not None:
        q.gates = gates.values.data_ptr()
        q.gate_of, q.products = (0 if t is None else t.data_ptr() for t in gates[1:])
    return q


def _run(problem, backward, operands):
    try:
        cpu_runtime.load().lora(addressof(problem), backward, _allocate)
    except ValueError:
        check_values(operands)
        raise


def forward(operands, options, gates=None):
    """y in the dtype of x and the leading shape of x."""
    operands = without_gaps(operands)
    y, adds = new_output(operands, options.workspace_bytes)
    _run(_problem(operands, options, y, adds, gates), False, operands)
    return y.view(*operands.x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates=None):
    """The `Gradients` that `needs` asks for."""
    operands, dout = without_gaps(operands), dout.contiguous()
    x, _, A, B, _ = operands[:5]
    dy = dout.flatten(0, -2)
    dx, adds, dweight, dbias = new_gradients(dy, operands, needs, options.workspace_bytes)
    dA, dB = (t.new_empty(t.shape) if need else None for t, need in ((A, needs.A), (B, needs.B)))
    if needs.x or needs.A or needs.B or (gates is not None and gates.products is not None):
        q = _problem(operands, options, dout, adds, gates)
        q.dx, q.dA, q.dB = (0 if t is None else t.data_ptr() for t in (dx, dA, dB))
        _run(q, True, operands)
    return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)

"""Fills the struct that the C++ kernels of the backends cpu and cuda read (runtime/problem.py, csrc/problem.h)."""

from ctxkern.dtypes import CODES
from ctxkern.modulated.operands import Gradients, Operands, contiguous
from ctxkern.runtime.problem import Problem

_MOST_BYTES = 1 << 60


def _has_gaps(t):
    return t is not None and not t.is_contiguous()


def without_gaps(operands):
    """The same with what kernels read row by row made contiguous; weights and bilinears stay as they lie."""
    x, context, weights, bilinears, biases, index, bounds = operands
    if index is bounds is None and x.is_contiguous() and context.is_contiguous() and not any(map(_has_gaps, biases)):
        return operands
    biases = [contiguous(bias) for bias in biases]
    return Operands(
        contiguous(x), contiguous(context), weights, bilinears, biases, contiguous(index), contiguous(bounds)
    )


def problem_of(operands, rows, *, outer_above, workspace_bytes, grads: Gradients | None = None, threads=1, tf32=False):
    """The `Problem` of operands without gaps; it keeps no tensor alive.

    rows: y of each projection, or dy where `grads` says which gradients to write. A context per token is a table of N
    rows for N sequences of one row each.
    """
    x, context, weights, bilinears, biases, context_index, cu_seqlens = operands
    q = Problem()
    q.d_in, q.context_dim = x.shape[-1], context.shape[-1]
    q.outer_above, q.workspace_bytes = outer_above, min(workspace_bytes, _MOST_BYTES)
    q.threads, q.tf32 = threads, tf32
    _fill_batch(q.batch, x.shape, context, context_index, cu_seqlens)
    _fill(q.x, x)
    _fill(q.context, context)
    if grads is not None:
        if grads.x is not None:
            q.dx = grads.x.data_ptr()
        if grads.context is not None:
            q.dcontext = grads.context.data_ptr()
    q.projections = len(rows)
    projections = q.projection
    for i, bilinear in enumerate(bilinears):
        p, weight, bias = projections[i], weights[i], biases[i]
        p.d_out = bilinear.shape[1]
        _fill_bilinear(p.bilinear, bilinear)
        p.rows = rows[i].data_ptr()
        if weight is not None:
            _fill_matrix(p.weight, weight)
        if grads is None:
            if bias is not None:
                _fill(p.bias, bias)
            continue
        if grads.weights[i] is not None:
            _fill_matrix(p.dweight, grads.weights[i])
        if grads.bilinears[i] is not None:
            _fill_bilinear(p.dbilinear, grads.bilinears[i])
    return q


def _fill_batch(batch, shape, context, index, bounds):
    if context.dim() == 3:
        batch.tokens = batch.table = batch.sequences = shape[0] * shape[1]
        batch.length = 1
        return
    batch.table = context.shape[0]
    if bounds is None:
        batch.sequences, batch.length = shape[0], shape[1]
        batch.tokens = shape[0] * shape[1]
    else:
        batch.tokens, batch.sequences, batch.bounds = shape[0], bounds.shape[0] - 1, bounds.data_ptr()
    if index is not None:
        batch.index = index.data_ptr()


def _fill(operand, t):
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]


def _fill_matrix(operand, t):
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]
    operand.stride0, operand.stride1 = t.stride()


def _fill_bilinear(operand, t):
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]
    operand.stride0, operand.stride1, operand.stride2 = t.stride()

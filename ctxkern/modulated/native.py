"""Fills the struct that the C++ kernels of the backends cpu and cuda read (runtime/problem.py, csrc/problem.h)."""

from ctxkern.dtypes import CODES
from ctxkern.modulated.operands import Gradients, Operands, contiguous
from ctxkern.runtime.problem import Problem

_MOST_BYTES = 1 << 60


def without_gaps(operands):
    """The same with what kernels read row by row made contiguous; weights and bilinears stay as they lie."""
    x, context, weights, bilinears, biases, index, bounds = operands
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
    d_in, context_dim = x.shape[-1], context.shape[-1]
    q = Problem()
    q.d_in, q.context_dim = d_in, context_dim
    q.outer_above, q.workspace_bytes = outer_above, min(workspace_bytes, _MOST_BYTES)
    q.threads, q.tf32 = threads, tf32
    _fill_batch(q.batch, operands)
    _fill_rows(q.x, x, d_in)
    _fill_rows(q.context, context, context_dim)
    q.projections = len(rows)
    for p, weight, bilinear, each in zip(q.projection, weights, bilinears, rows, strict=False):
        p.d_out = d_out = bilinear.shape[1]
        _fill_bilinear(p.bilinear, bilinear)
        _fill_rows(p.rows, each, d_out)
        if weight is not None:
            _fill_matrix(p.weight, weight)
    if grads is None:
        for p, bias in zip(q.projection, biases, strict=False):
            if bias is not None:
                p.bias.data, p.bias.dtype, p.bias.stride0 = bias.data_ptr(), CODES[bias.dtype], 1
        return q
    if grads.x is not None:
        _fill_rows(q.dx, grads.x, d_in)
    if grads.context is not None:
        _fill_rows(q.dcontext, grads.context, context_dim)
    for p, dweight, dbilinear in zip(q.projection, grads.weights, grads.bilinears, strict=False):
        if dweight is not None:
            _fill_matrix(p.dweight, dweight)
        if dbilinear is not None:
            _fill_bilinear(p.dbilinear, dbilinear)
    return q


def _fill_batch(batch, operands):
    x, context, index, bounds = operands.x, operands.context, operands.context_index, operands.cu_seqlens
    shape = x.shape
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


def _fill_rows(operand, t, columns):
    operand.data, operand.dtype = t.data_ptr(), CODES[t.dtype]
    operand.stride0, operand.stride1 = columns, 1


def _fill_matrix(operand, t):
    operand.data, operand.dtype = t.data_ptr(), CODES[t.dtype]
    operand.stride0, operand.stride1 = t.stride()


def _fill_bilinear(operand, t):
    operand.data, operand.dtype = t.data_ptr(), CODES[t.dtype]
    operand.stride0, operand.stride1, operand.stride2 = t.stride()

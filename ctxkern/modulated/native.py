"""Fills the struct that the C++ kernels of the backends cpu and cuda read (runtime/problem.py, csrc/problem.h)."""

from ctxkern.modulated.operands import Gradients, Operands, contiguous
from ctxkern.runtime.fill import fill, fill_batch, fill_cube, fill_matrix
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
    if context.dim() == 3:
        batch = q.batch
        batch.tokens = batch.table = batch.sequences = x.shape[0] * x.shape[1]
        batch.length = 1
    else:
        fill_batch(q.batch, x.shape, context.shape[0], context_index, cu_seqlens)
    fill(q.x, x)
    fill(q.context, context)
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
        fill_cube(p.bilinear, bilinear)
        p.rows = rows[i].data_ptr()
        if weight is not None:
            fill_matrix(p.weight, weight)
        if grads is None:
            if bias is not None:
                fill(p.bias, bias)
            continue
        if grads.weights[i] is not None:
            fill_matrix(p.dweight, grads.weights[i])
        if grads.bilinears[i] is not None:
            fill_cube(p.dbilinear, grads.bilinears[i])
    return q

"""Per-example low-rank weights, y_u = x_u weight^T + scale (x_u A_u^T) B_u^T, with rows grouped by adapter.

Backward, with h_u = x_u A_u^T and g_u = scale dy_u B_u: dx = dy weight + g A, dA = g^T x, dB = scale dy^T h.
"""

import torch

from ctxkern.dtypes import accumulator
from ctxkern.lora.operands import Gradients
from ctxkern.plan import compute_dtype
from ctxkern.runtime.rows import group_rows


def _chunks(rows, per_adapter, workspace_bytes):
    """Buckets cut so that the adapters of each piece fit the workspace."""
    size = max(1, workspace_bytes // max(per_adapter, 1))
    for b in rows.buckets:
        for at in range(0, b.count, size):
            yield b._replace(first=b.first + at, count=min(size, b.count - at), start=b.start + at * b.rows)


def _pieces(rows, x, A, B, compute, workspace_bytes):
    """(adapters' rows of the table, x [u, R, D], A [u, r, D], B [u, E, r], rows of the grouped batch) a piece."""
    per_adapter = (A[0].numel() + B[0].numel()) * compute.itemsize if len(A) else 0
    for b in _chunks(rows, per_adapter, workspace_bytes):
        adapters = slice(b.first, b.first + b.count)
        table = adapters if rows.slots is None else rows.slots[adapters]
        if rows.spread is not None:
            table = rows.spread[adapters]
        span = slice(b.start, b.start + b.count * b.rows)
        yield table, x[span].view(b.count, b.rows, x.shape[1]), A[table].to(compute), B[table].to(compute), span


def _strips(weight, dim, compute, workspace_bytes):
    """Slices of a dimension of weight [E, D]: one, or as many as keep a cast copy within the workspace."""
    if weight is None:
        return []
    size, other = weight.shape[dim], weight.shape[1 - dim]
    step = size if weight.dtype == compute else workspace_bytes // max(1, other * compute.itemsize)
    return [slice(i, i + step) for step in (max(1, step),) for i in range(0, size, step)]


def forward(operands, scale, workspace_bytes):
    """y in the dtype of x and the leading shape of x."""
    x, weight, A, B, bias, adapter_index, cu_seqlens = operands
    rows = group_rows(x, len(A), adapter_index, cu_seqlens, "adapter_index")
    compute = compute_dtype(x.device.type, x.dtype)
    grouped = rows.gather(x).to(compute)
    y = grouped.new_zeros(len(grouped), B.shape[1])
    for strip in _strips(weight, 0, compute, workspace_bytes):
        torch.mm(grouped, weight[strip].to(compute).mT, out=y[:, strip])
    for _, x_u, a, b, span in _pieces(rows, grouped, A, B, compute, workspace_bytes):
        y[span].view(*x_u.shape[:2], B.shape[1]).baddbmm_(torch.bmm(x_u, a.mT), b.mT, alpha=scale)
    if bias is not None:
        y.add_(bias)
    return rows.scatter(y.to(x.dtype), x)


def backward(dout, operands, scale, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    x, weight, A, B, bias, adapter_index, cu_seqlens = operands
    rows = group_rows(x, len(A), adapter_index, cu_seqlens, "adapter_index")
    compute = compute_dtype(x.device.type, x.dtype)
    grouped, dy = rows.gather(x).to(compute), rows.gather(dout).to(compute)
    need_x, need_w, need_a, need_b, need_bias = needs
    dx = grouped.new_zeros(grouped.shape) if need_x else None
    dweight = torch.empty_like(weight) if need_w else None
    if need_x:
        for strip in _strips(weight, 1, compute, workspace_bytes):
            torch.mm(dy, weight[:, strip].to(compute), out=dx[:, strip])
    if need_w:
        for strip in _strips(weight, 0, compute, workspace_bytes):
            dweight[strip] = dy[:, strip].mT @ grouped
    dA = A.new_zeros(A.shape, dtype=torch.promote_types(A.dtype, torch.float32)) if need_a else None
    dB = B.new_zeros(B.shape, dtype=torch.promote_types(B.dtype, torch.float32)) if need_b else None
    for table, x_u, a, b, span in _pieces(rows, grouped, A, B, compute, workspace_bytes):
        dy_u = dy[span].view(*x_u.shape[:2], B.shape[1])
        inner = torch.bmm(dy_u, b).mul_(scale)
        if need_x:
            dx[span].view(x_u.shape).baddbmm_(inner, a)
        if need_a:
            _add_rows(dA, table, torch.bmm(inner.mT, x_u))
        if need_b:
            _add_rows(dB, table, torch.bmm(dy_u.mT, torch.bmm(x_u, a.mT)).mul_(scale))
    if need_x:
        dx = rows.scatter(dx.to(x.dtype), x)
    dbias = dy.sum(0, dtype=accumulator(dy.dtype)).to(bias.dtype) if need_bias else None
    dA, dB = (total if total is None else total.to(t.dtype) for total, t in ((dA, A), (dB, B)))
    return Gradients(dx, dweight, dA, dB, dbias)


def _add_rows(total, table, part):
    if isinstance(table, slice):
        total[table] = part.to(total.dtype)
    else:
        total.index_put_((table,), part.to(total.dtype), accumulate=True)

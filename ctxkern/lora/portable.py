"""Per-example low-rank weights, y_u = x_u weight^T + scale (x_u A_u^T) B_u^T, with rows grouped by adapter.

Backward, with h_u = x_u A_u^T and g_u = scale dy_u B_u: dx = dy weight + g A, dA = g^T x, dB = scale dy^T h.
"""

import torch

from ctxkern.checks import check_index, check_ranks, is_readable
from ctxkern.lora.base import base_gradients, base_product
from ctxkern.lora.operands import Gradients
from ctxkern.plan import compute_dtype
from ctxkern.reference import lora_dropout_mask
from ctxkern.runtime.rows import group_rows


def _chunks(rows, per_adapter, workspace_bytes):
    """Buckets cut so that the adapters of each piece fit the workspace."""
    size = max(1, workspace_bytes // max(per_adapter, 1))
    for b in rows.buckets:
        for at in range(0, b.count, size):
            yield b._replace(first=b.first + at, count=min(size, b.count - at), start=b.start + at * b.rows)


def _pieces(rows, operands, compute, workspace_bytes):
    """(adapters' rows of the table, A [u, r, D], B [u, E, r], grouped rows, their shape [u, R]) of each piece."""
    A, B, ranks = operands.A, operands.B, operands.ranks
    per_adapter = (A[0].numel() + B[0].numel()) * compute.itemsize if len(A) else 0
    for b in _chunks(rows, per_adapter, workspace_bytes):
        adapters = slice(b.first, b.first + b.count)
        table = adapters if rows.slots is None else rows.slots[adapters]
        if rows.spread is not None:
            table = rows.spread[adapters]
        span = slice(b.start, b.start + b.count * b.rows)
        a_u, b_u = A[table].to(compute), B[table].to(compute)
        if ranks is not None:
            there = torch.arange(A.shape[1], device=A.device) < ranks[table][:, None]
            a_u, b_u = a_u.where(there[:, :, None], 0), b_u.where(there[:, None], 0)
        yield table, a_u, b_u, span, (b.count, b.rows)


class _Grouped:
    """x, and what the update does to its rows, by adapter."""

    def __init__(self, operands, scale, dropout):
        x, A, index, bounds = operands.x, operands.A, operands.adapter_index, operands.cu_seqlens
        self.compute = compute_dtype(x.device.type, x.dtype)
        if index is not None and is_readable(index):
            check_index(index, len(A), "adapter_index", -1)
        if operands.ranks is not None and is_readable(operands.ranks):
            check_ranks(operands.ranks, A.shape[1])
        used = index if index is None else index.clamp(min=0)
        self.rows = group_rows(x, len(A), used, bounds, "adapter_index")
        self.scale, self.kept = self._scale(operands, used, scale / (1 - dropout)), None
        if dropout:
            mask = lora_dropout_mask(operands.seed, x.shape[:-1].numel(), x.shape[-1], dropout)
            self.kept = self.rows.gather(mask.view(x.shape))
        self.x = self.dropped(self.gather(x))

    def gather(self, t):
        return self.rows.gather(t).to(self.compute)

    def dropped(self, t, span=slice(None)):
        return t if self.kept is None else t.where(self.kept[span], 0)

    def _scale(self, operands, used, number):
        """A number, or what each grouped row is scaled by, [N, 1]: zero for sequences without an adapter."""
        x, scales, index, bounds = operands.x, operands.scales, operands.adapter_index, operands.cu_seqlens
        if scales is None and index is None:
            return number
        sequences = len(x) if bounds is None else len(bounds) - 1
        each = torch.full((sequences,), number, dtype=torch.float32, device=x.device)
        if scales is not None:
            each = each * (scales if used is None else scales[used])
        if index is not None:
            each = each.where(index >= 0, 0)
        if bounds is None:
            each = each[:, None].expand(x.shape[:2])
        else:
            token = torch.arange(len(x), dtype=torch.int32, device=x.device)
            each = each[torch.bucketize(token, bounds[1:], right=True)]
        return self.gather(each[..., None])

    def scaled(self, inner, span):
        if isinstance(self.scale, float):
            return inner.mul_(self.scale)
        factor = self.scale[span].view(*inner.shape[:2], 1)
        return (inner * factor).where(factor != 0, 0)


def forward(operands, options):
    """y in the dtype of x and the leading shape of x."""
    x, weight, A, B, bias = operands[:5]
    flat = x.flatten(0, -2)
    if weight is not None:
        y = base_product(flat, weight, bias, options.workspace_bytes)
    else:
        y = x.new_zeros(len(flat), B.shape[1]) if bias is None else bias.to(x.dtype).expand(len(flat), -1)
    if len(A) == 0:
        return y.reshape(*x.shape[:-1], B.shape[1])
    grouped = _Grouped(operands, options.scale, options.dropout)
    y = grouped.gather(y.view(*x.shape[:-1], B.shape[1])).clone()
    for _, a, b, span, shape in _pieces(grouped.rows, operands, grouped.compute, options.workspace_bytes):
        h = grouped.scaled(torch.bmm(grouped.x[span].view(*shape, x.shape[-1]), a.mT), span)
        y[span].view(*shape, B.shape[1]).baddbmm_(h, b.mT)
    return grouped.rows.scatter(y.to(x.dtype), x)


def backward(dout, operands, options, needs):
    """The `Gradients` that `needs` asks for."""
    x, weight, A, B, bias = operands[:5]
    flat, dy = x.flatten(0, -2), dout.flatten(0, -2)
    dx, dweight, dbias = base_gradients(flat, dy, weight, bias, needs, options.workspace_bytes)
    if needs.x and dx is None:
        dx = flat.new_zeros(flat.shape)
    if not (needs.x or needs.A or needs.B) or len(A) == 0:
        dA, dB = (torch.zeros_like(t) if need else None for t, need in ((A, needs.A), (B, needs.B)))
        return Gradients(dx if dx is None else dx.view(x.shape), dweight, dA, dB, dbias)
    grouped = _Grouped(operands, options.scale, options.dropout)
    dx = grouped.gather(dx.view(x.shape)).clone() if needs.x else None
    dy = grouped.gather(dout)
    dA, dB = (
        t.new_zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32)) if need else None
        for t, need in ((A, needs.A), (B, needs.B))
    )
    for table, a, b, span, shape in _pieces(grouped.rows, operands, grouped.compute, options.workspace_bytes):
        x_u, dy_u = (t[span].view(*shape, t.shape[-1]) for t in (grouped.x, dy))
        g = grouped.scaled(torch.bmm(dy_u, b), span)
        if needs.x:
            dx[span] += grouped.dropped(torch.bmm(g, a).flatten(0, 1), span)
        if needs.A:
            _add_rows(dA, table, torch.bmm(g.mT, x_u))
        if needs.B:
            _add_rows(dB, table, torch.bmm(dy_u.mT, grouped.scaled(torch.bmm(x_u, a.mT), span)))
    if needs.x:
        dx = grouped.rows.scatter(dx.to(x.dtype), x)
    dA, dB = (total if total is None else total.to(t.dtype) for total, t in ((dA, A), (dB, B)))
    return Gradients(dx, dweight, dA, dB, dbias)


def _add_rows(total, table, part):
    if isinstance(table, slice):
        total[table] = part.to(total.dtype)
    else:
        total.index_put_((table,), part.to(total.dtype), accumulate=True)

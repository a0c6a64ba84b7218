"""Panel with one strip, for batches whose weights together are small: as few operations as the maths has.

Such calls are bound by the number of operations and what stands around them, so nothing is planned or cast.
"""

import torch

from ctxkern.planner import compute_dtype

# above, strips that stay in cache win; measured with float32 at B=32, S=128, d=512, K=64 (bench/LOG.md)
_LIMIT = 8 << 20
# rows a context below which the planner weighs the outer form
_ROWS = 4


def fits(x, context, weights, bilinears, rows, workspace_bytes):
    """Whether a call has a context a sequence, equally many rows for each, small weights, one dtype, dense parameters."""
    if len(rows.buckets) != 1 or rows.spread is not None or context.dim() != 2:
        return False
    dtype, bucket = x.dtype, rows.buckets[0]
    if bucket.rows < _ROWS or context.dtype is not dtype or compute_dtype(x.device.type, dtype) is not dtype:
        return False
    limit = min(workspace_bytes, _LIMIT)
    for weight, bilinear in zip(weights, bilinears, strict=True):
        d_in, d_out, context_dim = bilinear.shape
        size = bucket.count * d_in * d_out * dtype.itemsize
        if not 0 < size <= limit or bilinear.dtype is not dtype or not context_dim or not bilinear.is_contiguous():
            return False
        if weight is not None and (weight.dtype is not dtype or not weight.is_contiguous()):
            return False
    return True


def _weights(context, weight, bilinear):
    d_in, d_out, context_dim = bilinear.shape
    flat = bilinear.view(-1, context_dim).t()
    made = torch.mm(context, flat) if weight is None else torch.addmm(weight.reshape(1, -1), context, flat)
    return made.view(-1, d_in, d_out)


def forward(x, context, weights, bilinears, biases):
    """[y] [U, R, E], one a projection, of x [U, R, D] and context [U, K]."""
    outs = []
    for weight, bilinear, bias in zip(weights, bilinears, biases, strict=True):
        y = torch.bmm(x, _weights(context, weight, bilinear))
        outs.append(y if bias is None else y.add_(bias))
    return outs


def backward(douts, x, context, weights, bilinears, needs):
    """(dx [U, R, D], dcontext [U, K], dweights, dbilinears, dbiases), None where `needs` asks for none."""
    n = len(bilinears)
    need_x, need_context, *each = needs
    dx = dcontext = None
    dweights, dbilinears, dbiases = [None] * n, [None] * n, [None] * n
    for i, (dout, weight, bilinear) in enumerate(zip(douts, weights, bilinears, strict=True)):
        d_in, d_out, context_dim = bilinear.shape
        if each[2 * n + i]:
            dbiases[i] = dout.sum((0, 1))
        if need_x:
            made = _weights(context, weight, bilinear).mT
            dx = torch.bmm(dout, made) if dx is None else dx.baddbmm_(dout, made)
            del made
        if not (need_context or each[i] or each[n + i]):
            continue
        products = torch.bmm(x.mT, dout)
        if each[i]:
            dweights[i] = products.sum(0)
        flat = products.view(-1, d_in * d_out)
        if each[n + i]:
            dbilinears[i] = torch.mm(flat.t(), context).view(bilinear.shape)
        if need_context:
            part = torch.mm(flat, bilinear.view(-1, context_dim))
            if n > 1:
                part = part.to(torch.promote_types(part.dtype, torch.float32))
            dcontext = part if dcontext is None else dcontext.add_(part)
    return dx, dcontext, dweights, dbilinears, dbiases

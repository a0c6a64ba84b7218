"""Panel with one strip, for batches whose weights together are small: as few operations as the maths has.

Such calls are bound by the number of operations and what stands around them, so nothing is planned, grouped or cast.
"""

import torch

from ctxkern.planner import compute_dtype

# above, strips that stay in cache win; measured with float32 at B=32, S=128, d=512, K=64 (bench/LOG.md)
_LIMIT = 8 << 20
# rows a context below which the planner weighs the outer form
_ROWS = 4


def fits(x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes):
    """Whether a call is a padded batch with a context a sequence, small weights, one dtype and dense bilinears."""
    if context_index is not None or cu_seqlens is not None or context.dim() != 2:
        return False
    batch, seq, d_in = x.shape
    dtype = x.dtype
    if seq < _ROWS or context.dtype is not dtype or compute_dtype(x.device.type, dtype) is not dtype:
        return False
    limit = min(workspace_bytes, _LIMIT)
    for weight, bilinear in zip(weights, bilinears, strict=True):
        size = batch * d_in * bilinear.shape[1] * dtype.itemsize
        if (
            not 0 < size <= limit
            or bilinear.dtype is not dtype
            or not bilinear.shape[2]
            or not bilinear.is_contiguous()
        ):
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
    """[y], one a projection."""
    outs = []
    for weight, bilinear, bias in zip(weights, bilinears, biases, strict=True):
        y = torch.bmm(x, _weights(context, weight, bilinear))
        outs.append(y if bias is None else y.add_(bias))
    return outs


def backward(douts, x, context, weights, bilinears, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` asks for none."""
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
    if need_context:
        dcontext = dcontext.to(context.dtype)
    return dx, dcontext, dweights, dbilinears, dbiases

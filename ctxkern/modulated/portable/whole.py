"""Panel with one strip, for batches whose weights together are small: as few operations as the maths has.

Such calls are bound by the number of operations and what stands around them, so nothing is planned or cast.
"""

import torch

from ctxkern.plan import compute_dtype

# above, strips that stay in cache win; measured with float32 at B=32, S=128, d=512, K=64 (bench/LOG.md)
_LIMIT = 8 << 20
# rows per context below which the outer form is considered
_ROWS = 4


def fits(x, context, weights, bilinears, batch, rows, workspace_bytes):
    """Whether a call with `batch` contexts, equally many rows for each, has small weights and dense parameters of one
    dtype: that of x or wider."""
    dtype = context.dtype
    if rows < _ROWS or dtype.itemsize < x.dtype.itemsize or compute_dtype(x.device.type, x.dtype) is not x.dtype:
        return False
    # next to a half, weights and G are held in both dtypes
    held = dtype.itemsize if dtype is x.dtype else dtype.itemsize + x.dtype.itemsize
    limit = min(workspace_bytes, _LIMIT)
    for weight, bilinear in zip(weights, bilinears, strict=True):
        d_in, d_out, context_dim = bilinear.shape
        if not 0 < batch * d_in * d_out * held <= limit or not context_dim:
            return False
        if bilinear.dtype is not dtype or not bilinear.is_contiguous():
            return False
        if weight is not None and (weight.dtype is not dtype or not weight.is_contiguous()):
            return False
    return True


# operations of one of D small products below which D of them cost more than one with the strip flat
_SMALL_PRODUCT = 1 << 16


def _flat(context, bilinear):
    """Whether to make weights as [U, D·E], else as D products, [D, U, E] (see panel.py)."""
    work = 2 * context.shape[0] * bilinear.shape[1] * bilinear.shape[2]
    return bilinear.dtype.itemsize == 2 or work < _SMALL_PRODUCT


def _weights(context, weight, bilinear):
    """[U, D, E]"""
    d_in, d_out, context_dim = bilinear.shape
    if _flat(context, bilinear):
        flat = bilinear.view(-1, context_dim).t()
        made = torch.mm(context, flat) if weight is None else torch.addmm(weight.view(1, -1), context, flat)
        return made.view(-1, d_in, d_out)
    context, bilinear = context.expand(d_in, *context.shape), bilinear.mT
    made = torch.bmm(context, bilinear) if weight is None else torch.baddbmm(weight[:, None], context, bilinear)
    return made.transpose(0, 1)


def _narrow(made, dtype):
    return made if made.dtype is dtype else made.to(dtype, memory_format=torch.contiguous_format)


def _like_weights(context, bilinear):
    d_in, d_out, _ = bilinear.shape
    if _flat(context, bilinear):
        return context.new_empty(len(context), d_in, d_out)
    return context.new_empty(d_in, len(context), d_out).transpose(0, 1)


def _from_products(products, context, bilinear, need_weight, need_bilinear, need_context):
    """(dweight, dbilinear, dcontext) from G [U, D, E], laid out as the weights are."""
    d_in, d_out, context_dim = bilinear.shape
    dweight = products.sum(0) if need_weight else None
    if _flat(context, bilinear):
        flat = products.view(-1, d_in * d_out)
        dbilinear = torch.mm(flat.t(), context).view(bilinear.shape) if need_bilinear else None
        return dweight, dbilinear, torch.mm(flat, bilinear.view(-1, context_dim)) if need_context else None
    each = products.transpose(0, 1)
    dbilinear = torch.bmm(each.mT, context.expand(d_in, *context.shape)) if need_bilinear else None
    return dweight, dbilinear, torch.bmm(each, bilinear).sum(0) if need_context else None


def forward(x, context, weights, bilinears, biases):
    """[y] [U, R, E], one per projection, of x [U, R, D] and context [U, K]."""
    outs = []
    for weight, bilinear, bias in zip(weights, bilinears, biases, strict=True):
        made = _weights(context, weight, bilinear)
        y = torch.bmm(x, _narrow(made, x.dtype))
        outs.append(y if bias is None else y.add_(bias))
    return outs


def backward(douts, x, context, weights, bilinears, biases, needs):
    """(dx [U, R, D], dcontext [U, K], dweights, dbilinears, dbiases), None where `needs` does not ask for it."""
    n = len(bilinears)
    need_x, need_context, need_w, need_t, need_b = needs
    dx = dcontext = None
    dweights, dbilinears, dbiases = [None] * n, [None] * n, [None] * n
    for i, (dout, weight, bilinear) in enumerate(zip(douts, weights, bilinears, strict=True)):
        if need_b[i]:
            dbiases[i] = dout.sum((0, 1)).to(biases[i].dtype)
        buffer = None
        if need_x:
            buffer = _narrow(_weights(context, weight, bilinear), x.dtype)
            dx = torch.bmm(dout, buffer.mT) if dx is None else dx.baddbmm_(dout, buffer.mT)
        if need_context or need_w[i] or need_t[i]:
            if buffer is None:
                buffer = _like_weights(context, bilinear) if context.dtype is x.dtype else None
            products = torch.bmm(x.mT, dout, out=buffer)
            if context.dtype is not x.dtype:
                products = _like_weights(context, bilinear).copy_(products)
            wanted = (need_w[i], need_t[i], need_context)
            dweights[i], dbilinears[i], part = _from_products(products, context, bilinear, *wanted)
            if need_context:
                if n > 1:
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                dcontext = part if dcontext is None else dcontext.add_(part)
    if n > 1 and need_context:
        dcontext = dcontext.to(context.dtype)
    return dx, dcontext, dweights, dbilinears, dbiases

"""Outer: (x ⊗ c) as the operand; no weight is ever made. For few rows per context, and for a context per row.

With the strip M = bilinear[:, strip, :] as a matrix [D, strip·K]:

    forward    Z = x M  [N, strip, K],  y[:, strip] = x weight[:, strip] + sum_k Z c
    backward   P = dy[:, strip] ⊗ c  [N, strip·K]
               dx += P M^T,  dM = x^T P,  dc += sum_strip Z dy,  and the plain products of weight

The intermediate is taken in chunks of rows; sums over strips and chunks are in float32 or wider, in a fixed order.
"""

import torch


def _chunks(size, step):
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def outer_forward(call, plan):
    """y [N, E] in grouped order, in the accumulator's dtype."""
    _, d_out, context_dim = call.bilinear.shape
    x, contexts = call.x, call.contexts
    wide = _product_dtype(call)
    y = x.new_empty(len(x), d_out, dtype=torch.promote_types(wide, torch.float32))
    for cols in _chunks(d_out, plan.strip):
        matrix = _matrix(call, cols, wide)
        weight = None if call.weight is None else call.weight[:, cols].to(wide)
        for rows in _chunks(len(x), plan.group):
            rows_x, rows_c = x[rows].to(wide), contexts[rows].to(wide)
            inner = (rows_x @ matrix).view(len(rows_x), -1, context_dim)
            y[rows, cols] = torch.bmm(inner, rows_c[:, :, None])[:, :, 0]
            # the next chunk's is made before the name is bound again
            del inner
            if weight is not None:
                y[rows, cols] += rows_x @ weight
    return y


def outer_backward(call, plan, dy, grads):
    """Fills `grads`; `grads.contexts` is that of each row's context, [N, K]."""
    x, contexts = call.x, call.contexts
    wide = _product_dtype(call)
    total = torch.promote_types(wide, torch.float32)
    dx = None
    if grads.need_x:
        dx = x.new_zeros(x.shape, dtype=total) if grads.x is None else grads.x.to(total)
    if grads.need_contexts:
        grads.contexts = contexts.new_zeros(contexts.shape, dtype=total)
    if grads.need_weight:
        grads.weight = torch.empty_like(call.weight)
    if grads.need_bilinear:
        grads.bilinear = torch.empty_like(call.bilinear)
    for cols in _chunks(call.bilinear.shape[1], plan.strip):
        matrix = _matrix(call, cols, wide)
        if grads.need_weight:
            grads.weight[:, cols] = x.mT @ dy[:, cols]
        dmatrix = None
        for rows in _chunks(len(x), plan.group):
            rows_dy = dy[rows, cols].to(wide)
            if grads.need_contexts:
                inner = (x[rows].to(wide) @ matrix).view(len(rows_dy), rows_dy.shape[1], -1)
                grads.contexts[rows] += torch.bmm(rows_dy[:, None], inner)[:, 0]
                del inner
            if not (grads.need_x or grads.need_bilinear):
                continue
            # an elementwise product is laid out as its factors are
            pairs = rows_dy.contiguous()[:, :, None] * contexts[rows].to(wide).contiguous()[:, None, :]
            pairs = pairs.view(len(rows_dy), -1)
            if dx is not None:
                dx[rows] += pairs @ matrix.mT
                if call.weight is not None:
                    dx[rows] += rows_dy @ call.weight[:, cols].to(wide).mT
            if grads.need_bilinear:
                part = x[rows].to(wide).mT @ pairs
                if plan.group < len(x):
                    part = part.to(total) if dmatrix is None else dmatrix.add_(part)
                dmatrix = part
                del part
            del pairs
        if grads.need_bilinear:
            grads.bilinear[:, cols] = dmatrix.view(x.shape[1], -1, contexts.shape[1])
    if dx is not None:
        grads.x = dx.to(call.compute)


def _product_dtype(call):
    return torch.promote_types(torch.promote_types(call.bilinear.dtype, call.contexts.dtype), call.compute)


def _matrix(call, cols, wide):
    """bilinear[:, cols, :] as [D, strip·K]: a view where it is one."""
    strip = call.bilinear[:, cols]
    return strip.reshape(len(strip), -1).to(wide)

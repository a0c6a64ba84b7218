"""Outer: (x ⊗ c) as the operand; no weight is ever made. For few rows a context, and for a context a row.

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
            if weight is not None:
                y[rows, cols] += rows_x @ weight
    return y


def outer_backward(call, plan, dy, dx, dweight, dbilinear, need_context):
    """Adds to dx [N, D], writes dweight and dbilinear (each may be None); returns the gradient of each row's context,
    [N, K], or None."""
    _, d_out, context_dim = call.bilinear.shape
    x, contexts = call.x, call.contexts
    wide = _product_dtype(call)
    total = torch.promote_types(wide, torch.float32)
    dx_total = None if dx is None else dx.to(total)
    dcontexts = contexts.new_zeros(contexts.shape, dtype=total) if need_context else None
    chunks = _chunks(len(x), plan.group)
    for cols in _chunks(d_out, plan.strip):
        matrix = _matrix(call, cols, wide)
        weight = None if call.weight is None or dx is None else call.weight[:, cols].to(wide).mT
        dmatrix = None
        for rows in chunks:
            rows_x, rows_c, rows_dy = x[rows].to(wide), contexts[rows].to(wide), dy[rows, cols].to(wide)
            if need_context:
                inner = (rows_x @ matrix).view(len(rows_x), -1, context_dim)
                dcontexts[rows] += torch.bmm(rows_dy[:, None], inner)[:, 0]
                del inner
            if dx is not None or dbilinear is not None:
                # an elementwise product is laid out as its factors are
                pairs = rows_dy.contiguous()[:, :, None] * rows_c.contiguous()[:, None, :]
                pairs = pairs.view(len(rows_x), -1)
            if dx is not None:
                dx_total[rows] += pairs @ matrix.mT
                if weight is not None:
                    dx_total[rows] += rows_dy @ weight
            if dbilinear is not None:
                part = rows_x.mT @ pairs
                if len(chunks) > 1:
                    part = part.to(total) if dmatrix is None else dmatrix.add_(part)
                dmatrix = part
        if dbilinear is not None:
            dbilinear[:, cols] = dmatrix.view(x.shape[1], -1, context_dim)
        if dweight is not None:
            dweight[:, cols] = x.mT @ dy[:, cols]
    if dx is not None:
        dx.copy_(dx_total)
    return dcontexts


def _product_dtype(call):
    return torch.promote_types(torch.promote_types(call.bilinear.dtype, call.contexts.dtype), call.compute)


def _matrix(call, cols, wide):
    """bilinear[:, cols, :] as [D, strip·K]: a view where it is one."""
    strip = call.bilinear[:, cols]
    return strip.reshape(len(strip), -1).to(wide)

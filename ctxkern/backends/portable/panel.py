"""Panel: the weights of all contexts for a strip of rows of D, used at once and never kept.

    forward    W[u, d, e] = weight[d, e] + sum_k c[u, k] bilinear[d, e, k]        one product [U, K] x [K, strip·E]
               y_u       += x_u[:, strip] W_u
    backward   dx_u[:, strip] = dy_u W_u^T,  G_u = x_u[:, strip]^T dy_u
               dweight[strip] = sum_u G_u,   dbilinear[strip] = G^T c,   dc += G bilinear[strip]

Strips run over rows of D in both directions because `bilinear` [D, E, K] is contiguous there: a strip is a matrix as it
lies. Over several strips y accumulates in float32 or wider. Contexts are taken in groups where a strip for all of them
passes the workspace.
"""

import torch


class _Strips:
    """The weight strips of one call, made into buffers that are allocated once."""

    def __init__(self, call, plan):
        self.call = call
        self.plan = plan
        self.d_in, self.d_out, self.context_dim = call.bilinear.shape
        self.wide = torch.promote_types(torch.promote_types(call.bilinear.dtype, call.contexts.dtype), call.compute)
        self.contexts = call.contexts.to(self.wide)
        self.buffer = call.x.new_empty(plan.group * plan.strip * self.d_out, dtype=self.wide)
        self.narrow = torch.empty_like(self.buffer, dtype=call.compute) if self.wide != call.compute else self.buffer
        self.spread = call.rows.spread

    def spans(self):
        return [(d, min(d + self.plan.strip, self.d_in)) for d in range(0, self.d_in, self.plan.strip)]

    def groups(self):
        """(contexts, buckets): runs of at most `plan.group` contexts, buckets cut to fit."""
        total, size = self.call.rows.contexts, self.plan.group
        if size >= total or self.spread is not None:
            return [(slice(0, total), self.call.rows.buckets)]
        groups = []
        for lo in range(0, total, size):
            hi = min(lo + size, total)
            cut = []
            for b in self.call.rows.buckets:
                first, last = max(lo, b.first), min(hi, b.first + b.count)
                if first < last:
                    start = b.start + (first - b.first) * b.rows
                    cut.append(b._replace(first=first, count=last - first, start=start))
            groups.append((slice(lo, hi), cut))
        return groups

    def bilinear(self, span):
        """[strip·E, K] of `bilinear`: a view where it is one."""
        return self.call.bilinear[span[0] : span[1]].reshape(-1, self.context_dim).to(self.wide)

    def weights(self, span, group, bilinear):
        """[U or B, strip, E] in the compute dtype."""
        count = group.stop - group.start
        shape = (count, span[1] - span[0], self.d_out)
        made = self.buffer[: shape[0] * shape[1] * shape[2]].view(count, -1)
        contexts = self.contexts[group]
        if self.call.weight is None:
            torch.mm(contexts, bilinear.t(), out=made)
        else:
            weight = self.call.weight[span[0] : span[1]].reshape(1, -1).to(self.wide)
            torch.addmm(weight, contexts, bilinear.t(), out=made)
        if self.wide != self.call.compute:
            made = self.narrow[: made.numel()].view(shape).copy_(made.view(shape))
        made = made.view(shape)
        return made if self.spread is None else made.index_select(0, self.spread)

    def widen(self, products):
        """G as [contexts, strip·E] in the dtype of the strips."""
        flat = products.view(len(products), -1)
        if self.wide == flat.dtype:
            return flat
        if self.spread is not None:
            return flat.to(self.wide)
        return self.buffer[: flat.numel()].view(flat.shape).copy_(flat)


def _bucket(bucket, t):
    """The rows of a bucket as [contexts, rows, columns]."""
    return t[bucket.start : bucket.start + bucket.count * bucket.rows].view(bucket.count, bucket.rows, t.shape[1])


def panel_forward(call, plan):
    """y [N, E] in grouped order."""
    strips = _Strips(call, plan)
    spans = strips.spans()
    whole = len(spans) == 1
    dtype = call.compute if whole else torch.promote_types(call.compute, torch.float32)
    y = call.x.new_empty(len(call.x), strips.d_out, dtype=dtype)
    for span in spans:
        bilinear = strips.bilinear(span)
        for group, buckets in strips.groups():
            weights = strips.weights(span, group, bilinear)
            for b in buckets:
                _project(
                    _bucket(b, call.x)[:, :, span[0] : span[1]],
                    weights[b.first - group.start : b.first - group.start + b.count],
                    _bucket(b, y),
                    first=span[0] == 0,
                )
    return y


def _project(x, weights, y, first):
    if first and x.dtype == y.dtype:
        torch.bmm(x, weights, out=y)
    elif first:
        y.copy_(torch.bmm(x, weights))
    elif x.dtype == y.dtype:
        y.baddbmm_(x, weights)
    else:
        y.add_(torch.bmm(x, weights))


def panel_backward(call, plan, dy, grads):
    """Fills `grads`."""
    strips = _Strips(call, plan)
    wide = torch.promote_types(strips.wide, torch.float32)
    groups = strips.groups()
    contexts = strips.contexts if strips.spread is None else strips.contexts.index_select(0, strips.spread)
    if grads.need_x and grads.x is None:
        grads.x = call.x.new_zeros(call.x.shape)
    if grads.need_contexts:
        grads.contexts = contexts.new_zeros(contexts.shape, dtype=wide)
    if grads.need_weight:
        grads.weight = torch.empty_like(call.weight)
    if grads.need_bilinear:
        grads.bilinear = torch.empty_like(call.bilinear)
    for span in strips.spans():
        lo, hi = span
        bilinear = strips.bilinear(span)
        dweight, dbilinear = (
            None if out is None else _Sum(out[lo:hi], len(groups), wide) for out in (grads.weight, grads.bilinear)
        )
        for group, buckets in groups:
            if grads.need_x:
                _add_dx(call, strips, span, group, buckets, bilinear, dy, grads.x)
            if not (grads.need_weight or grads.need_bilinear or grads.need_contexts):
                continue
            products = _outer_products(call, strips, buckets, span, group, dy)
            if strips.spread is not None:
                group = slice(0, len(products))
            flat = strips.widen(products)
            if dweight is not None:
                dweight.add(flat.sum(0).view(hi - lo, -1))
            if dbilinear is not None:
                dbilinear.add_product(flat.t(), contexts[group])
            if grads.need_contexts:
                grads.contexts[group] += flat @ bilinear
        for total in (dweight, dbilinear):
            if total is not None:
                total.write()


def _add_dx(call, strips, span, group, buckets, bilinear, dy, dx):
    """dx_u[:, strip] += dy_u W_u^T"""
    weights = strips.weights(span, group, bilinear)
    for b in buckets:
        at = b.first - group.start
        # [contexts, rows, E] x [contexts, E, strip]
        to = _bucket(b, dx)[:, :, span[0] : span[1]]
        to.baddbmm_(_bucket(b, dy), weights[at : at + b.count].mT)


def _outer_products(call, strips, buckets, span, group, dy):
    """G_u = x_u[:, strip]^T dy_u, [U or B, strip, E] in the compute dtype."""
    count = group.stop - group.start if strips.spread is None else strips.spread.numel()
    shape = (count, span[1] - span[0], strips.d_out)
    if strips.spread is None:
        grads = strips.narrow[: shape[0] * shape[1] * shape[2]].view(shape)
    else:
        grads = call.x.new_empty(shape)
    for b in buckets:
        at = b.first - group.start
        x = _bucket(b, call.x)[:, :, span[0] : span[1]]
        torch.bmm(x.mT, _bucket(b, dy), out=grads[at : at + b.count])
    return grads


class _Sum:
    """A strip of a gradient, written once: straight into `out`, or through float32 where groups add up in a half."""

    def __init__(self, out, groups, wide):
        self.out = out
        self.started = False
        self.total = out if groups == 1 or out.dtype == wide else out.new_empty(out.shape, dtype=wide)

    def add(self, part):
        if self.started:
            self.total += part
        else:
            self.total.copy_(part)
        self.started = True

    def add_product(self, left, right):
        """total += left [strip·E, U] right [U, K]"""
        flat = self.total.view(-1, right.shape[1]) if self.total.is_contiguous() else None
        if flat is None or flat.dtype != left.dtype:
            self.add((left @ right).view(self.total.shape))
        elif self.started:
            flat.addmm_(left, right)
        else:
            torch.mm(left, right, out=flat)
        self.started = True

    def write(self):
        if self.total is not self.out:
            self.out.copy_(self.total)

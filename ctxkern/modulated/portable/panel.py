"""Panel: the weights of all contexts for a strip, used at once and never kept.

    weights    W[u, d, e] = weight[d, e] + sum_k c[u, k] bilinear[d, e, k]
    forward    y_u = x_u W_u, by strips of columns of E, so that no sum crosses a strip
    backward   by strips of rows of D, so that one pass over `bilinear` serves all:
               dx_u[:, strip] = dy_u W_u^T,  G_u = x_u[:, strip]^T dy_u,
               dweight[strip] = sum_u G_u,   dbilinear[strip] = G^T c,   dc += G bilinear[strip]

The products that contract K or U are skinny. In float32 they are batches of D small ones, strips [strip, U, E]; in a
half (`_Flat`) they are one with the strip flat, [U, strip·E], and the forward too goes by rows of D, adding up in
float32: each is the faster way by 25 to 40 % on CPUs (bench/LOG.md). Contexts are taken in groups where a strip for all
of them passes the workspace.
"""

import torch


class _Strips:
    """Makes strips of weights into buffers allocated once, and turns strips of G into gradients."""

    def __init__(self, call, plan, wide):
        self.call, self.plan, self.wide = call, plan, wide
        self.d_in, self.d_out, self.context_dim = call.bilinear.shape
        self.contexts = call.contexts.to(wide)
        self.spread = call.rows.spread
        across = self.d_in if plan.strip_of == "E" else self.d_out
        self.buffer = call.x.new_empty(plan.group * plan.strip * across, dtype=wide)
        self.narrow = self.buffer if wide == call.compute else torch.empty_like(self.buffer, dtype=call.compute)

    def spans(self):
        size = self.d_out if self.plan.strip_of == "E" else self.d_in
        return [(i, min(i + self.plan.strip, size)) for i in range(0, size, self.plan.strip)]

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

    def parameters(self, span):
        """(weight or None, bilinear) of a strip, [rows, columns] and [rows, columns, K]: views where no cast is due."""
        at = (slice(None), slice(*span)) if self.plan.strip_of == "E" else (slice(*span),)
        weight = self.call.weight
        return None if weight is None else weight[at].to(self.wide), self.call.bilinear[at].to(self.wide)

    def weights(self, weight, bilinear, group):
        """[U or B, rows, columns] in the compute dtype."""
        contexts = self.contexts[group]
        made = self._make(weight, bilinear, contexts)
        if self.wide != self.call.compute:
            made = self.narrow[: made.numel()].view(made.shape).copy_(made)
        return made if self.spread is None else made.index_select(0, self.spread)

    def _make(self, weight, bilinear, contexts):
        rows, columns, _ = bilinear.shape
        count = len(contexts)
        made = self.buffer[: count * rows * columns].view(rows, count, columns)
        # rows times [U, K] x [K, columns]
        pairs = (contexts.expand(rows, *contexts.shape), bilinear.transpose(1, 2))
        torch.bmm(*pairs, out=made) if weight is None else torch.baddbmm(weight[:, None], *pairs, out=made)
        return made.transpose(0, 1)

    def products(self, count, rows):
        """Where G goes, [count, rows, E] in the compute dtype."""
        if self.spread is not None:
            return self.call.x.new_empty(count, rows, self.d_out)
        if self.wide != self.call.compute:
            return self.narrow[: count * rows * self.d_out].view(count, rows, self.d_out)
        return self._laid(count, rows)

    def _laid(self, count, rows):
        return self.buffer[: count * rows * self.d_out].view(rows, count, self.d_out).transpose(0, 1)

    def widen(self, products):
        """G in the dtype and layout of the strips."""
        if self.wide == products.dtype:
            return products
        if self.spread is not None:
            return products.to(self.wide)
        return self._laid(*products.shape[:2]).copy_(products)

    def add_dbilinear(self, products, contexts, total):
        """total [rows, E, K] += G^T c"""
        left = products.permute(1, 2, 0)
        right = contexts.expand(len(left), *contexts.shape)
        if total.started:
            total.sum.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=total.sum)
        total.started = True

    def dcontexts(self, products, bilinear):
        """[count, K]"""
        return torch.bmm(products.transpose(0, 1), bilinear).sum(0)


class _Flat(_Strips):
    """The same with strips [U, strip·E]."""

    def _flat(self, bilinear):
        return bilinear.reshape(-1, self.context_dim)

    def _make(self, weight, bilinear, contexts):
        shape = (len(contexts), *bilinear.shape[:2])
        made = self.buffer[: shape[0] * shape[1] * shape[2]].view(len(contexts), -1)
        flat = self._flat(bilinear).t()
        if weight is None:
            torch.mm(contexts, flat, out=made)
        else:
            torch.addmm(weight.reshape(1, -1), contexts, flat, out=made)
        return made.view(shape)

    def _laid(self, count, rows):
        return self.buffer[: count * rows * self.d_out].view(count, rows, self.d_out)

    def add_dbilinear(self, products, contexts, total):
        left = products.flatten(1).t()
        if total.sum.dtype == self.wide:
            torch.mm(left, contexts, out=total.sum.view(-1, self.context_dim))
            total.started = True
        else:
            total.add((left @ contexts).view(total.sum.shape))

    def dcontexts(self, products, bilinear):
        return products.flatten(1) @ self._flat(bilinear)


def _exact(call):
    """The dtype in which no parameter is rounded."""
    return torch.promote_types(torch.promote_types(call.bilinear.dtype, call.contexts.dtype), call.compute)


def _strips(call, plan, wide):
    return (_Flat if wide.itemsize == 2 else _Strips)(call, plan, wide)


def _bucket(bucket, t):
    """The rows of a bucket as [contexts, rows, columns]."""
    return t[bucket.start : bucket.start + bucket.count * bucket.rows].view(bucket.count, bucket.rows, t.shape[1])


def panel_forward(call, plan):
    """y [N, E] in grouped order, in the compute dtype or wider."""
    by_columns = plan.strip_of == "E"
    # rows of D forward: in a half, to which wider parameters are rounded as they are read
    strips = _strips(call, plan, _exact(call) if by_columns else call.compute)
    spans = strips.spans()
    complete = by_columns or len(spans) == 1
    dtype = call.compute if complete else torch.promote_types(call.compute, torch.float32)
    y = call.x.new_empty(len(call.x), strips.d_out, dtype=dtype)
    for lo, hi in spans:
        weight, bilinear = strips.parameters((lo, hi))
        for group, buckets in strips.groups():
            weights = strips.weights(weight, bilinear, group)
            for b in buckets:
                w = weights[b.first - group.start : b.first - group.start + b.count]
                if by_columns:
                    _project(_bucket(b, call.x), w, _bucket(b, y)[:, :, lo:hi], first=True)
                else:
                    _project(_bucket(b, call.x)[:, :, lo:hi], w, _bucket(b, y), first=lo == 0)
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
    strips = _strips(call, plan, _exact(call))
    groups = strips.groups()
    contexts = strips.contexts if strips.spread is None else strips.contexts.index_select(0, strips.spread)
    if grads.need_x and grads.x is None:
        grads.x = call.x.new_zeros(call.x.shape)
    if grads.need_contexts:
        grads.contexts = contexts.new_zeros(contexts.shape, dtype=torch.promote_types(strips.wide, torch.float32))
    if grads.need_weight:
        grads.weight = torch.empty_like(call.weight)
    if grads.need_bilinear:
        grads.bilinear = torch.empty_like(call.bilinear)
    for lo, hi in strips.spans():
        weight, bilinear = strips.parameters((lo, hi))
        dweight, dbilinear = (
            None if out is None else _Sum(out[lo:hi], len(groups), strips) for out in (grads.weight, grads.bilinear)
        )
        for group, buckets in groups:
            if grads.need_x:
                weights = strips.weights(weight, bilinear, group)
                for b in buckets:
                    w = weights[b.first - group.start : b.first - group.start + b.count]
                    # [contexts, rows, E] x [contexts, E, strip]
                    _bucket(b, grads.x)[:, :, lo:hi].baddbmm_(_bucket(b, dy), w.mT)
                del weights
            if not (grads.need_weight or grads.need_bilinear or grads.need_contexts):
                continue
            products = strips.widen(_outer_products(call, strips, buckets, (lo, hi), group, dy))
            if strips.spread is not None:
                group = slice(0, len(products))
            if dweight is not None:
                dweight.add(products.sum(0))
            if dbilinear is not None:
                strips.add_dbilinear(products, contexts[group], dbilinear)
            if grads.need_contexts:
                grads.contexts[group] += strips.dcontexts(products, bilinear)
        for gradient in (dweight, dbilinear):
            if gradient is not None:
                gradient.write()


def _outer_products(call, strips, buckets, span, group, dy):
    """G_u = x_u[:, strip]^T dy_u, [U or B, strip, E] in the compute dtype."""
    count = group.stop - group.start if strips.spread is None else strips.spread.numel()
    products = strips.products(count, span[1] - span[0])
    for b in buckets:
        at = b.first - group.start
        x = _bucket(b, call.x)[:, :, span[0] : span[1]]
        torch.bmm(x.mT, _bucket(b, dy), out=products[at : at + b.count])
    return products


class _Sum:
    """A strip of a gradient, written once: straight into `out`, or through a separate sum where groups add up in a
    half, or dtype or layout of `out` keep a product from being written there."""

    def __init__(self, out, groups, strips):
        self.out, self.started = out, False
        wide = strips.wide if groups == 1 else torch.promote_types(strips.wide, torch.float32)
        direct = out.dtype == wide and (out.stride(-1) == 1 if out.dtype.itemsize > 2 else out.is_contiguous())
        self.sum = out if direct else out.new_empty(out.shape, dtype=wide)

    def add(self, part):
        if self.started:
            self.sum += part
        else:
            self.sum.copy_(part)
        self.started = True

    def write(self):
        if self.sum is not self.out:
            self.out.copy_(self.sum)

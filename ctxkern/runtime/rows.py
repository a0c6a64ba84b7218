"""Which rows of x use which context: sequences of one context are brought together, so that its weight is made once.

`Rows` holds the distinct contexts (U of them) and `buckets`: runs of adjacent contexts with equally many rows, so that
a bucket is one batched product. On the CPU the indices are read and checked here; a padded batch on another device is
grouped without reading them (`spread`), so that nothing waits for the device.
"""

from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

from ctxkern.checks import check_bounds, check_index


class Bucket(NamedTuple):
    """Contexts first..first+count, each with `rows` rows, the first of which is row `start` of the grouped rows."""

    first: int
    count: int
    start: int
    rows: int


@dataclass(slots=True)
class Rows:
    buckets: list
    contexts: int  # U
    slots: torch.Tensor | None = None  # [U] rows of the context table (equal ones unshared), None: all of them in order
    order: torch.Tensor | None = None  # permutation of the sequences or packed rows, None: as they are
    spread: torch.Tensor | None = None  # [B] context of each sequence where weights are gathered instead of rows

    @property
    def even(self):
        """(contexts, rows each) of a single bucket."""
        return self.buckets[0].count, self.buckets[0].rows

    def pick(self, table):
        """The rows of a context (or adapter) table that are used, [U, ...]."""
        return table if self.slots is None else table.index_select(0, self.slots)

    def unpick(self, picked, size):
        """The gradient of a table of `size` rows from that of its picked rows; equal ones add up in float32."""
        if self.slots is None:
            return picked
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        return picked.new_zeros(size, *picked.shape[1:]).index_put_((self.slots,), picked, accumulate=True)

    def gather(self, x):
        """x [B, S, D] or [N, D] as [N, D] in grouped order; a view where nothing moves."""
        x = x if self.order is None else x.index_select(0, self.order)
        return x.flatten(0, -2)

    def batch(self, x):
        """The rows of a single bucket as [U, R, D]."""
        bucket = self.buckets[0]
        if self.order is None and x.dim() == 3 and x.shape[0] == bucket.count:
            return x
        return self.gather(x).view(bucket.count, bucket.rows, -1)

    def scatter(self, y, like):
        """The inverse of `gather`: y [N, E] or [U, R, E] in the order and leading shape of `like`."""
        if self.order is None and y.dim() == like.dim() and y.shape[0] == like.shape[0]:
            return y
        y = y.view(*like.shape[:-1], y.shape[-1])
        return y if self.order is None else torch.empty_like(y).index_copy_(0, self.order, y)


def group_rows(x, table_rows, index, cu_seqlens, what="context_index", worth_sharing=None):
    """Rows of x [B, S, D] or packed [N, D] by context. `index` [B] or None, `cu_seqlens` [B + 1] or None.

    worth_sharing(sequences, contexts): whether the sequences of a padded batch are brought together; None: always.
    """
    if cu_seqlens is None and (index is None or index.device.type != "cpu"):
        batch, seq = x.shape[:2]
        if index is None:
            return Rows([Bucket(0, batch, 0, seq)], batch)
        if table_rows <= batch:
            return Rows([Bucket(0, batch, 0, seq)], table_rows, spread=index)
        return Rows([Bucket(0, batch, 0, seq)], batch, slots=index)
    values = None if index is None else check_index(index, table_rows, what)
    if cu_seqlens is None:
        if worth_sharing is not None and not worth_sharing(len(values), len(set(values))):
            return Rows([Bucket(0, len(values), 0, x.shape[1])], len(values), slots=index)
        return _group_padded(values, x.shape[1], table_rows, x.device)
    bounds = check_bounds(cu_seqlens, x.shape[0])
    return _group_packed(values, bounds, table_rows, x.device)


def _group_padded(index, seq, table_rows, device):
    members = {}
    for b, u in enumerate(index):
        members.setdefault(u, []).append(b)
    slots = sorted(members, key=lambda u: len(members[u]))
    sequences = [b for u in slots for b in members[u]]
    order = None if _rises(sequences) else torch.tensor(sequences, device=device)
    return _rows(slots, [len(members[u]) * seq for u in slots], order, table_rows, device)


def _group_packed(index, bounds, table_rows, device):
    spans = list(zip(bounds, bounds[1:], strict=False))
    members = {}
    for b, u in enumerate(range(len(spans)) if index is None else index):
        if spans[b][0] < spans[b][1]:
            members.setdefault(u, []).append(spans[b])
    counts = {u: sum(hi - lo for lo, hi in runs) for u, runs in members.items()}
    slots = list(members)
    order = None
    if not _rises([lo for u in slots for lo, _ in members[u]]):
        slots.sort(key=counts.get)
        order = torch.cat([torch.arange(lo, hi, device=device) for u in slots for lo, hi in members[u]])
    return _rows(slots, [counts[u] for u in slots], order, table_rows, device)


def _rows(slots, counts, order, table_rows, device):
    starts = [0, *accumulate(counts)]
    buckets, first = [], 0
    for rows, run in groupby(counts):
        count = len(list(run))
        buckets.append(Bucket(first, count, starts[first], rows))
        first += count
    every = len(slots) == table_rows and _rises(slots)
    return Rows(buckets, len(slots), None if every else torch.tensor(slots, dtype=torch.int64, device=device), order)


def _rises(values):
    return all(a < b for a, b in zip(values, values[1:], strict=False))

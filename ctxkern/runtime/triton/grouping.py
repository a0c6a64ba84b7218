"""Which rows of x belong to which context, found on the device: equal indices become one context, without waiting.

Contexts in use are numbered 0 to U - 1 by their first sequence, and their rows are brought together: the grouped rows.
A tile is up to `block` grouped rows of one context. Rows of a sequence whose index is −1, where a family takes that,
belong to none. U is known on the device alone, so that buffers have room for `limit` contexts and `tiles` tiles, the
most there can be. Without an index and without bounds every sequence is a context of `length` rows, no buffer is needed
and UNIFORM is true.

The buffer, int32, one part after another:
  contexts, tiles          how many there are
  slot [limit]             row of the context table
  first [limit + 1]        first grouped row of a context
  tile_first [limit + 1]   its first tile
  tile_context [tiles]     context of a tile
  order [N]                row of x of a grouped row; only with an index

Scratch, int32: for each sequence the first grouped row of its context, if it is the first of it, −1 without context;
with an index also the first sequence of the same index, the rows of it before, and in all.

  seen:   the last three of the scratch                                                  O(B²) comparisons
  number: running sums over those firsts: contexts, rows, tiles                          one program
  order:  tile_context and order                                                         a program per sequence

The outer form leaves rows in their order and takes only the slot of each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launches import Operand
from .sizes import ASSERTING, OPTIONS, cdiv, next_power_of_2

_SEEN_BLOCK = 64
_NUMBER_BLOCK = 256
_ORDER_BLOCK = 1024


class Groups(NamedTuple):
    """What kernels take to find the rows of a context."""

    buffer: Operand | None  # None where uniform
    limit: int
    tiles: int
    length: int
    block: int
    uniform: bool
    ordered: bool

    def arguments(self):
        """As kernels take them."""
        return {
            "groups_ptr": self.buffer,
            "limit": self.limit,
            "tiles": self.tiles,
            "length": self.length,
            "UNIFORM": self.uniform,
            "ORDERED": self.ordered,
        }


@triton.jit
def context_count(groups_ptr, limit, UNIFORM: tl.constexpr):
    """U."""
    count = limit
    if not UNIFORM:
        count = tl.load(groups_ptr)
    return count


@triton.jit
def slots_of(groups_ptr, u, mask, UNIFORM: tl.constexpr):
    """Rows of the context table of contexts u."""
    slot = u
    if not UNIFORM:
        slot = tl.load(groups_ptr + 2 + u, mask=mask, other=0)
    return slot


@triton.jit
def range_of(groups_ptr, limit, length, u, UNIFORM: tl.constexpr):
    """First grouped row of context u, and the one after its last."""
    begin = u * length
    end = begin + length
    if not UNIFORM:
        begin = tl.load(groups_ptr + 2 + limit + u)
        end = tl.load(groups_ptr + 3 + limit + u)
    return begin, end


@triton.jit
def rows_at(groups_ptr, limit, tiles, grouped, mask, ORDERED: tl.constexpr):
    """Rows of x of grouped rows."""
    rows = grouped
    if ORDERED:
        rows = tl.load(groups_ptr + 4 + 3 * limit + tiles + grouped, mask=mask, other=0)
    return rows


@triton.jit
def tile_count(groups_ptr, tiles, UNIFORM: tl.constexpr):
    count = tiles
    if not UNIFORM:
        count = tl.load(groups_ptr + 1)
    return count


@triton.jit
def tile_range(groups_ptr, limit, length, tile, BLOCK_M: tl.constexpr, UNIFORM: tl.constexpr):
    """Context of a tile, its first grouped row, and the one after the last of its context."""
    per = tl.cdiv(length, BLOCK_M)
    u = tile // tl.maximum(per, 1)
    inside = tile - u * per
    if not UNIFORM:
        u = tl.load(groups_ptr + 4 + 3 * limit + tile)
        inside = tile - tl.load(groups_ptr + 3 + 2 * limit + u)
    begin, end = range_of(groups_ptr, limit, length, u, UNIFORM)
    return u, begin + inside * BLOCK_M, end


@triton.jit
def _sequence(cu_seqlens_ptr, b, mask, rows, length, PACKED: tl.constexpr):
    """First row and number of rows of sequences b, cut to the rows that there are."""
    begin = b * length
    size = tl.where(mask, length, 0)
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + b, mask=mask, other=0)
        end = tl.load(cu_seqlens_ptr + b + 1, mask=mask, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), rows)
        size = tl.minimum(tl.maximum(end, begin), rows) - begin
    return begin, size


@triton.jit(debug=True)
def _seen_kernel(
    index_ptr,  # [B]
    cu_seqlens_ptr,  # [B + 1]
    scratch_ptr,  # [4, B], out but for the first
    sequences,
    rows,
    length,
    table,
    PACKED: tl.constexpr,
    LOWEST: tl.constexpr,  # of an index
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < sequences
    mine = tl.load(index_ptr + b, mask=mask, other=-1)
    tl.device_assert((mine >= LOWEST) & (mine < table), "an index lies outside the table", mask=mask)
    first = b
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, sequences, BLOCK):
        j = start + tl.arange(0, BLOCK)
        theirs = tl.load(index_ptr + j, mask=j < sequences, other=-2)
        _, size = _sequence(cu_seqlens_ptr, j, j < sequences, rows, length, PACKED)
        same = mine[:, None] == theirs[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], sequences), 1))
        before += tl.sum(tl.where(same & (j[None, :] < b[:, None]), size[None, :], 0), 1)
        total += tl.sum(tl.where(same, size[None, :], 0), 1)
    tl.store(scratch_ptr + sequences + b, first, mask=mask)
    tl.store(scratch_ptr + 2 * sequences + b, before, mask=mask)
    tl.store(scratch_ptr + 3 * sequences + b, total, mask=mask)


@triton.jit(debug=True)
def _number_kernel(
    index_ptr,
    cu_seqlens_ptr,
    scratch_ptr,  # out: its first
    groups_ptr,  # out
    sequences,
    rows,
    length,
    table,
    limit,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    contexts = 0
    at = 0
    tiles = 0
    if PACKED:
        tl.device_assert(tl.load(cu_seqlens_ptr) == 0, "cu_seqlens does not begin with 0")
        tl.device_assert(tl.load(cu_seqlens_ptr + sequences) == rows, "cu_seqlens does not end with the rows of x")
    for start in range(0, sequences, BLOCK):
        b = start + tl.arange(0, BLOCK)
        mask = b < sequences
        if PACKED:
            low = tl.load(cu_seqlens_ptr + b, mask=mask, other=0)
            high = tl.load(cu_seqlens_ptr + b + 1, mask=mask, other=0)
            tl.device_assert(low <= high, "cu_seqlens falls", mask=mask)
        slot = b
        if INDEXED:
            first = tl.load(scratch_ptr + sequences + b, mask=mask, other=-1)
            total = tl.load(scratch_ptr + 3 * sequences + b, mask=mask, other=0)
            used = mask & (first == b) & (total > 0)
            slot = tl.load(index_ptr + b, mask=mask, other=0).to(tl.int32)
            slot = tl.minimum(slot, table - 1)
            used = used & (slot >= 0)
        else:
            _, total = _sequence(cu_seqlens_ptr, b, mask, rows, length, PACKED)
            used = mask & (total > 0)
        one = used.to(tl.int32)
        size = tl.where(used, total, 0)
        count = tl.where(used, (total + BLOCK_M - 1) // BLOCK_M, 0)
        u = contexts + tl.cumsum(one, 0) - one
        row = at + tl.cumsum(size, 0) - size
        tile = tiles + tl.cumsum(count, 0) - count
        tl.store(groups_ptr + 2 + u, slot, mask=used)
        tl.store(groups_ptr + 2 + limit + u, row, mask=used)
        tl.store(groups_ptr + 3 + 2 * limit + u, tile, mask=used)
        tl.store(scratch_ptr + b, tl.where(slot < 0, -1, row), mask=mask)
        contexts += tl.sum(one, 0)
        at += tl.sum(size, 0)
        tiles += tl.sum(count, 0)
    tl.store(groups_ptr, contexts)
    tl.store(groups_ptr + 1, tiles)
    tl.store(groups_ptr + 2 + limit + contexts, at)
    tl.store(groups_ptr + 3 + 2 * limit + contexts, tiles)


@triton.jit
def _order_kernel(
    cu_seqlens_ptr,
    scratch_ptr,
    groups_ptr,
    sequences,
    rows,
    length,
    limit,
    tiles,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    if b < tl.load(groups_ptr):
        begin = tl.load(groups_ptr + 3 + 2 * limit + b)
        end = tl.load(groups_ptr + 4 + 2 * limit + b)
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            tl.store(groups_ptr + 4 + 3 * limit + t, b, mask=t < end)
    if INDEXED:
        begin, size = _sequence(cu_seqlens_ptr, b, True, rows, length, PACKED)
        first = tl.load(scratch_ptr + sequences + b)
        at = tl.load(scratch_ptr + first)
        size = tl.where(at < 0, 0, size)
        at += tl.load(scratch_ptr + 2 * sequences + b)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(groups_ptr + 4 + 3 * limit + tiles + at + i, begin + i, mask=i < size)


@triton.jit(debug=True)
def _slots_kernel(
    index_ptr,  # [B]
    cu_seqlens_ptr,  # [B + 1]
    slot_ptr,  # [N], out
    rows,
    length,
    table,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    slot = b
    if INDEXED:
        slot = tl.load(index_ptr + b)
        tl.device_assert((slot >= 0) & (slot < table), "context_index lies outside the table")
        slot = tl.minimum(tl.maximum(slot, 0), table - 1).to(tl.int32)
    if PACKED:
        low = tl.load(cu_seqlens_ptr + b)
        high = tl.load(cu_seqlens_ptr + b + 1)
        tl.device_assert((b > 0) | (low == 0), "cu_seqlens does not begin with 0")
        tl.device_assert((b < tl.num_programs(0) - 1) | (high == rows), "cu_seqlens does not end with the rows of x")
        tl.device_assert(low <= high, "cu_seqlens falls")
    begin, size = _sequence(cu_seqlens_ptr, b, True, rows, length, PACKED)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(slot_ptr + begin + i, tl.zeros([BLOCK], tl.int32) + slot, mask=i < size)


def slot_of_rows(layout, sizes, context_index, cu_seqlens):
    """[N] int32: row of the context table of each row of x; the first for rows that belong to no sequence.

    sizes: rows N, sequences B, the length of each, 0 where cu_seqlens [B + 1] has their bounds, rows of the table.
    """
    rows, sequences, length, table = sizes
    indexed, packed = context_index is not None, cu_seqlens is not None
    slot = layout.buffer(rows, torch.int32, zeroed=packed)
    arguments = {
        "index_ptr": context_index,
        "cu_seqlens_ptr": cu_seqlens,
        "slot_ptr": slot,
        "rows": rows,
        "length": length,
        "table": table,
        "PACKED": packed,
        "INDEXED": indexed,
        "BLOCK": min(_ORDER_BLOCK, next_power_of_2(length)) if length else _ORDER_BLOCK,
    }
    layout.launch(_slots_kernel, (sequences,), arguments | ASSERTING)
    return slot


def group_rows(layout, sizes, context_index, cu_seqlens, block, lowest=0):
    """The `Groups` of a call; sizes as in `slot_of_rows`. lowest: −1 where that is an index too, of no context."""
    rows, sequences, length, table = sizes
    indexed, packed = context_index is not None, cu_seqlens is not None
    if not indexed and not packed:
        tiles = sequences * cdiv(length, block)
        return Groups(None, sequences, tiles, length, block, True, False)
    limit = min(sequences, table)
    tiles = rows // block + limit
    groups = layout.buffer(4 + 3 * limit + tiles + (rows if indexed else 0), torch.int32)
    scratch = layout.buffer((4 if indexed else 1) * sequences, torch.int32)
    arguments = {
        "cu_seqlens_ptr": cu_seqlens,
        "scratch_ptr": scratch,
        "sequences": sequences,
        "rows": rows,
        "length": length,
        "PACKED": packed,
    }
    indices = {"index_ptr": context_index, "table": table, **ASSERTING}
    numbers = {"groups_ptr": groups, "limit": limit, "INDEXED": indexed}
    if indexed:
        seen = {"LOWEST": lowest, "BLOCK": _SEEN_BLOCK}
        layout.launch(_seen_kernel, (cdiv(sequences, _SEEN_BLOCK),), arguments | indices | seen)
    blocks = {"BLOCK_M": block, "BLOCK": _NUMBER_BLOCK}
    layout.launch(_number_kernel, (1,), arguments | indices | numbers | blocks)
    layout.launch(_order_kernel, (sequences,), arguments | numbers | {"tiles": tiles, "BLOCK": _ORDER_BLOCK, **OPTIONS})
    return Groups(groups, limit, tiles, length, block, False, indexed)

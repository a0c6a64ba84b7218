"""The low-rank update of rows, y_u += s (x_u A_uᵀ) B_uᵀ, and the pieces that its gradients are made of too.

  lora_y   h = s (mask ∘ x) A_uᵀ [rows, R], summed over D, then y += h B_uᵀ over E; h stays in registers

A program has a tile of rows of one adapter and all ranks. Where there are few tiles, columns of E are split among
programs, each of which makes h again. With gates, h is multiplied by rows of them. Between two products h is rounded to
DTYPE; where that is float16, rows of h are scaled by powers of two, as they may leave its range.
"""

import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_rounded, kernel, scale_to_float16, wide
from ctxkern.runtime.triton.grouping import rows_at, slots_of, tile_count, tile_range
from ctxkern.runtime.triton.sizes import ASSERTING, cdiv

_RANKS_BLOCK = 256


@triton.jit
def _mixed_bits(z):
    """The finaliser of splitmix64, a bijection of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keys_of(seed_ptr, rows):
    """64 bits for each row, from which the draws of its columns are made."""
    return _mixed_bits(rows.to(tl.uint64) + _mixed_bits(tl.load(seed_ptr).to(tl.uint64)))


@triton.jit
def dropped(values, keys, columns, kept_from):
    """values [rows, columns] where `ctxkern.reference.lora_dropout_mask` keeps them, zero elsewhere."""
    draws = columns.to(tl.uint32)[None, :] * 0x9E3779B1 + keys.to(tl.uint32)[:, None]
    draws = ((draws ^ (draws >> 16)) * 0x85EBCA6B) ^ (keys >> 32).to(tl.uint32)[:, None]
    draws = (draws ^ (draws >> 13)) * 0xC2B2AE35
    return tl.where((draws ^ (draws >> 16)) >= kept_from.to(tl.uint32), values, 0.0)


@triton.jit
def inner_product(
    rows_ptr,  # [N, size]
    factor_ptr,  # [size, R] of an adapter
    stride_c,
    stride_r,
    size,
    rows,
    mask_m,
    offs_r,
    mask_r,
    keys,
    kept_from,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows times a factor, summed over `size`."""
    # [BLOCK_M, BLOCK_R]
    acc = tl.zeros([rows.shape[0], offs_r.shape[0]], tl.float32)
    for c in range(0, size, BLOCK):
        offs_c = c + tl.arange(0, BLOCK)
        mask_c = offs_c < size
        at = rows_ptr + rows[:, None] * size + offs_c[None, :]
        values = tl.load(at, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        if DROPOUT:
            values = dropped(values, keys, offs_c, kept_from)
        at = factor_ptr + offs_c[:, None].to(tl.int64) * stride_c + offs_r[None, :].to(tl.int64) * stride_r
        factor = tl.load(at, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        acc = dot_rounded(values, factor, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    return acc


@triton.jit
def add_product(
    inner,  # [BLOCK_M, BLOCK_R], float32
    factor_ptr,  # [R, size] of an adapter
    out_ptr,  # [N, size]
    stride_r,
    stride_c,
    begin,
    end,
    size,
    rows,
    mask_m,
    offs_r,
    mask_r,
    keys,
    kept_from,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of `out`, columns begin to end, (+)= inner times a factor."""
    if SCALED:
        scale, inverse = scale_to_float16(tl.max(tl.abs(inner), 1))
        inner *= scale[:, None]
    left = inner.to(DTYPE)
    for c in range(begin, end, BLOCK):
        offs_c = c + tl.arange(0, BLOCK)
        mask_c = offs_c < end
        at = factor_ptr + offs_r[:, None].to(tl.int64) * stride_r + offs_c[None, :].to(tl.int64) * stride_c
        factor = tl.load(at, mask=mask_r[:, None] & mask_c[None, :], other=0.0)
        # [BLOCK_M, BLOCK]
        acc = tl.dot(left, factor.to(DTYPE), input_precision=PRECISION)
        if SCALED:
            acc *= inverse[:, None]
        if DROPOUT:
            acc = dropped(acc, keys, offs_c, kept_from)
        at = out_ptr + rows[:, None] * size + offs_c[None, :]
        mask = mask_m[:, None] & mask_c[None, :]
        if ADD:
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_of(scales_ptr, slot, scale):
    """What the update of an adapter is scaled by."""
    factor = scale
    if scales_ptr is not None:
        factor = scale * tl.load(scales_ptr + slot)
    return factor


@triton.jit
def ranks_of(ranks_ptr, slot, rank):
    """How many ranks an adapter has."""
    count = rank
    if ranks_ptr is not None:
        count = tl.load(ranks_ptr + slot).to(tl.int32)
        count = tl.minimum(count, rank)
    return count


@triton.jit(debug=True)
def _lora_ranks_kernel(ranks_ptr, table, rank, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < table
    counts = tl.load(ranks_ptr + at, mask=mask, other=0)
    tl.device_assert((counts >= 0) & (counts <= rank), "one of ranks lies outside of A and B", mask=mask)


def check_ranks(layout, ranks, table, rank):
    """Adds a launch that stops the device where an adapter has fewer ranks than none or more than there are."""
    arguments = {"ranks_ptr": ranks, "table": table, "rank": rank, "BLOCK": _RANKS_BLOCK, **ASSERTING}
    layout.launch(_lora_ranks_kernel, (cdiv(table, _RANKS_BLOCK),), arguments)


@triton.jit
def gates_of(gate_ptr, gate_index_ptr, rows, mask_m, offs_r, mask_r, rank):
    """[rows, ranks] of the gate."""
    at = rows
    if gate_index_ptr is not None:
        at = tl.load(gate_index_ptr + rows, mask=mask_m, other=0)
    mask = mask_m[:, None] & mask_r[None, :]
    return tl.load(gate_ptr + at[:, None] * rank + offs_r[None, :], mask=mask, other=0.0)


@kernel
def _lora_y_kernel(
    # tensors
    x_ptr,  # [N, D]
    a_ptr,  # [b, R, D]
    b_ptr,  # [b, E, R]
    y_ptr,  # [N, E], added to
    scales_ptr,  # [b]
    ranks_ptr,  # [b]
    seed_ptr,  # []
    gate_ptr,  # [G, R]
    gate_index_ptr,  # [N]
    # strides
    stride_a_0,
    stride_a_1,
    stride_a_2,
    stride_b_0,
    stride_b_1,
    stride_b_2,
    # sizes
    d_in,
    d_out,
    rank,
    r_begin,
    e_step,  # columns of a part
    parts,
    scale,
    kept_from,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs of the same rows follow each other, so that x is read once
    tile = tl.program_id(0) // parts
    e_begin = (tl.program_id(0) % parts) * e_step
    if tile >= tile_count(groups_ptr, tiles, UNIFORM):
        return
    u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
    grouped = begin + tl.arange(0, BLOCK_M)
    mask_m = grouped < end
    rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
    slot = wide(slots_of(groups_ptr, u, True, UNIFORM))
    offs_r = r_begin + tl.arange(0, BLOCK_R)
    mask_r = offs_r < ranks_of(ranks_ptr, slot, rank)
    keys = rows
    if DROPOUT:
        keys = keys_of(seed_ptr, rows)
    h = inner_product(
        x_ptr,
        a_ptr + slot * stride_a_0,
        stride_c=stride_a_2,
        stride_r=stride_a_1,
        size=d_in,
        rows=rows,
        mask_m=mask_m,
        offs_r=offs_r,
        mask_r=mask_r,
        keys=keys,
        kept_from=kept_from,
        BLOCK=BLOCK_D,
        DROPOUT=DROPOUT,
        DTYPE=DTYPE,
        PRECISION=PRECISION,
    )
    h *= scale_of(scales_ptr, slot, scale)
    if gate_ptr is not None:
        h *= gates_of(gate_ptr, gate_index_ptr, rows, mask_m, offs_r, mask_r, rank)
    add_product(
        h,
        b_ptr + slot * stride_b_0,
        y_ptr,
        stride_r=stride_b_2,
        stride_c=stride_b_1,
        begin=e_begin,
        end=tl.minimum(e_begin + e_step, d_out),
        size=d_out,
        rows=rows,
        mask_m=mask_m,
        offs_r=offs_r,
        mask_r=mask_r,
        keys=keys,
        kept_from=kept_from,
        BLOCK=BLOCK_E,
        ADD=ADD,
        DROPOUT=False,
        SCALED=SCALED,
        DTYPE=DTYPE,
        PRECISION=PRECISION,
    )


def add_update(call, y, adds):
    """The update into y [N, E]; adds: to what is there."""
    for ranks in call.ranks():
        t = call.tile("lora_y", ranks, call.d_out, call.d_in)
        step, parts = call.parts(call.d_out, t.columns)
        call.launch(
            _lora_y_kernel,
            (call.groups.tiles * parts,),
            ranks,
            y_ptr=y,
            e_step=step,
            parts=parts,
            BLOCK_M=call.block,
            BLOCK_E=t.columns,
            BLOCK_D=t.depth,
            ADD=adds or ranks.first > 0,
            **t.launch(),
        )

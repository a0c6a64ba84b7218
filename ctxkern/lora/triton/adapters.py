"""Gradients of A and B, from the g and h that lora_dx leaves (gradients.py):

  lora_dab  dA_u = g_uᵀ (mask ∘ x_u)    dB_u = dy_uᵀ h_u

A program has a strip of columns of an adapter and goes over its rows in their order. Of an adapter with many rows it
takes a chunk, and lora_dab_sum adds up the chunks in their order: no float atomics.
"""

import torch
import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_rounded, kernel, scale_to_float16, wide
from ctxkern.runtime.triton.grouping import context_count, range_of, rows_at, slots_of
from ctxkern.runtime.triton.sizes import cdiv

from .call import strides_of
from .update import dropped, keys_of, ranks_of

# rows of an adapter that a program takes at most
_CHUNK = 2048


@triton.jit
def _strip_sum(
    rows_ptr,  # [N, size]: x or dy
    inner_ptr,  # [N, BLOCK_R]: g or h
    offs_c,
    size,
    begin,
    end,
    groups_ptr,
    limit,
    tiles,
    seed_ptr,
    kept_from,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ORDERED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns of the transposed rows times g or h, summed over grouped rows begin to end."""
    mask_c = offs_c < size
    offs_r = tl.arange(0, BLOCK_R)
    # [BLOCK_C, BLOCK_R]
    acc = tl.zeros([offs_c.shape[0], BLOCK_R], tl.float32)
    for n in range(begin, end, BLOCK_N):
        grouped = n + tl.arange(0, BLOCK_N)
        mask_n = grouped < end
        rows = rows_at(groups_ptr, limit, tiles, grouped, mask_n, ORDERED).to(tl.int64)
        at = rows_ptr + rows[:, None] * size + offs_c[None, :]
        values = tl.load(at, mask=mask_n[:, None] & mask_c[None, :], other=0.0)
        if DROPOUT:
            values = dropped(values, keys_of(seed_ptr, rows), offs_c, kept_from)
        at = inner_ptr + grouped[:, None].to(tl.int64) * BLOCK_R + offs_r[None, :]
        inner = tl.load(at, mask=mask_n[:, None], other=0.0)
        if SCALED:
            scale, inverse = scale_to_float16(tl.max(tl.abs(inner), 0))
            sums = tl.dot(tl.trans(values), (inner * scale[None, :]).to(DTYPE), input_precision=PRECISION)
            acc += sums * inverse[None, :]
        else:
            acc = dot_rounded(tl.trans(values), inner, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    return acc


@triton.jit
def _store_strip(acc, out_ptr, stride_r, stride_c, offs_c, offs_r, size, count, rank):
    """A strip of dA_u or dB_u; zeros beyond the ranks that count."""
    acc = tl.where((offs_r < count)[None, :], acc, 0.0)
    at = out_ptr + offs_c[:, None].to(tl.int64) * stride_c + offs_r[None, :].to(tl.int64) * stride_r
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(offs_c < size)[:, None] & (offs_r < rank)[None, :])


@triton.jit
def _strips_of(a_ptr, d_in, BLOCK_C: tl.constexpr):
    """How many strips a gradient has, none where it is not asked for."""
    strips = 0
    if a_ptr is not None:
        strips = tl.cdiv(d_in, BLOCK_C)
    return strips


@triton.jit
def _chunk_at(
    partial_ptr, strips, strip, begin, chunk, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Where a strip's sum over a chunk lies, [BLOCK_C, BLOCK_R].

    Of adapters with several chunks at most two begin one within CHUNK grouped rows, for one of which it is the first.
    """
    place = 2 * (begin // CHUNK + chunk) + tl.where(chunk == 0, 1, 0)
    cells = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    return partial_ptr + (wide(place) * strips + strip) * (BLOCK_C * BLOCK_R) + cells


@kernel
def _lora_dab_kernel(
    # tensors
    x_ptr,  # [N, D]
    dy_ptr,  # [N, E]
    g_ptr,  # [N, BLOCK_R]
    h_ptr,  # [N, BLOCK_R]
    da_ptr,  # [b, R, D], out
    db_ptr,  # [b, E, R], out
    partial_ptr,  # [places, strips, BLOCK_C, BLOCK_R], out: of adapters with several chunks
    ranks_ptr,  # [b]
    seed_ptr,  # []
    # strides
    stride_da_0,
    stride_da_1,
    stride_da_2,
    stride_db_0,
    stride_db_1,
    stride_db_2,
    # sizes
    d_in,
    d_out,
    rank,
    r_begin,
    kept_from,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # tile
    BLOCK_C: tl.constexpr,  # of D or E
    BLOCK_N: tl.constexpr,  # rows at a time
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of a strip of dA_u or, after those, of dB_u."""
    of_a = _strips_of(da_ptr, d_in, BLOCK_C)
    strips = of_a + _strips_of(db_ptr, d_out, BLOCK_C)
    # programs of one adapter follow each other: they read the same of g and h
    strip = tl.program_id(0) % strips
    u = tl.program_id(0) // strips
    chunk = tl.program_id(1)
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    begin, end = range_of(groups_ptr, limit, length, u, UNIFORM)
    first = begin + chunk * CHUNK
    if first >= end:
        return
    slot = wide(slots_of(groups_ptr, u, True, UNIFORM))
    count = ranks_of(ranks_ptr, slot, rank)
    offs_r = r_begin + tl.arange(0, BLOCK_R)
    last = tl.minimum(first + CHUNK, end)
    if da_ptr is not None:
        if strip < of_a:
            offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
            acc = _strip_sum(
                x_ptr,
                g_ptr,
                offs_c,
                size=d_in,
                begin=first,
                end=last,
                groups_ptr=groups_ptr,
                limit=limit,
                tiles=tiles,
                seed_ptr=seed_ptr,
                kept_from=kept_from,
                BLOCK_N=BLOCK_N,
                BLOCK_R=BLOCK_R,
                ORDERED=ORDERED,
                DROPOUT=DROPOUT,
                SCALED=SCALED,
                DTYPE=DTYPE,
                PRECISION=PRECISION,
            )
            if end - begin <= CHUNK:
                out_ptr = da_ptr + slot * stride_da_0
                _store_strip(acc, out_ptr, stride_da_1, stride_da_2, offs_c, offs_r, d_in, count, rank)
            elif partial_ptr is not None:
                at = _chunk_at(partial_ptr, strips, strip, begin, chunk, CHUNK, BLOCK_C, BLOCK_R)
                tl.store(at, acc)
    if db_ptr is not None:
        if strip >= of_a:
            offs_c = (strip - of_a) * BLOCK_C + tl.arange(0, BLOCK_C)
            acc = _strip_sum(
                dy_ptr,
                h_ptr,
                offs_c,
                size=d_out,
                begin=first,
                end=last,
                groups_ptr=groups_ptr,
                limit=limit,
                tiles=tiles,
                seed_ptr=seed_ptr,
                kept_from=kept_from,
                BLOCK_N=BLOCK_N,
                BLOCK_R=BLOCK_R,
                ORDERED=ORDERED,
                DROPOUT=False,
                SCALED=SCALED,
                DTYPE=DTYPE,
                PRECISION=PRECISION,
            )
            if end - begin <= CHUNK:
                out_ptr = db_ptr + slot * stride_db_0
                _store_strip(acc, out_ptr, stride_db_2, stride_db_1, offs_c, offs_r, d_out, count, rank)
            elif partial_ptr is not None:
                at = _chunk_at(partial_ptr, strips, strip, begin, chunk, CHUNK, BLOCK_C, BLOCK_R)
                tl.store(at, acc)


@kernel
def _lora_dab_sum_kernel(
    # tensors
    partial_ptr,  # [places, strips, BLOCK_C, BLOCK_R]
    da_ptr,  # [b, R, D], out
    db_ptr,  # [b, E, R], out
    ranks_ptr,  # [b]
    # strides
    stride_da_0,
    stride_da_1,
    stride_da_2,
    stride_db_0,
    stride_db_1,
    stride_db_2,
    # sizes
    d_in,
    d_out,
    rank,
    r_begin,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # tile
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """The chunks of a strip of adapters that have several, in their order."""
    of_a = _strips_of(da_ptr, d_in, BLOCK_C)
    strips = of_a + _strips_of(db_ptr, d_out, BLOCK_C)
    strip = tl.program_id(0) % strips
    u = tl.program_id(0) // strips
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    begin, end = range_of(groups_ptr, limit, length, u, UNIFORM)
    if end - begin <= CHUNK:
        return
    slot = wide(slots_of(groups_ptr, u, True, UNIFORM))
    count = ranks_of(ranks_ptr, slot, rank)
    offs_r = r_begin + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for chunk in range(tl.cdiv(end - begin, CHUNK)):
        acc += tl.load(_chunk_at(partial_ptr, strips, strip, begin, chunk, CHUNK, BLOCK_C, BLOCK_R))
    if da_ptr is not None:
        if strip < of_a:
            offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
            out_ptr = da_ptr + slot * stride_da_0
            _store_strip(acc, out_ptr, stride_da_1, stride_da_2, offs_c, offs_r, d_in, count, rank)
    if db_ptr is not None:
        if strip >= of_a:
            offs_c = (strip - of_a) * BLOCK_C + tl.arange(0, BLOCK_C)
            out_ptr = db_ptr + slot * stride_db_0
            _store_strip(acc, out_ptr, stride_db_2, stride_db_1, offs_c, offs_r, d_out, count, rank)


def lora_dab(call, ranks, dy, g, h, into):
    """dA from g, dB from h, those that `into` has room for."""
    t = call.tile("lora_dab", ranks)
    strips = cdiv(call.d_in, t.rows) * (g is not None) + cdiv(call.d_out, t.rows) * (h is not None)
    chunks = cdiv(call.groups.length if call.groups.uniform else call.tokens, _CHUNK)
    partial = None
    if chunks > 1:
        partial = call.buffer(2 * cdiv(call.tokens, _CHUNK) * strips * t.rows * ranks.block, torch.float32)
    shared = {
        "partial_ptr": partial,
        "da_ptr": into.A,
        "db_ptr": into.B,
        **strides_of("da", into.A),
        **strides_of("db", into.B),
        "BLOCK_C": t.rows,
        "CHUNK": _CHUNK,
    }
    grid = (call.groups.limit * strips, chunks)
    call.launch(_lora_dab_kernel, grid, ranks, dy_ptr=dy, g_ptr=g, h_ptr=h, BLOCK_N=t.depth, **shared, **t.launch())
    if partial is not None:
        # with 4 warps it spills on sm_80
        call.launch(_lora_dab_sum_kernel, grid[:1], ranks, **shared, **t._replace(warps=8).launch())

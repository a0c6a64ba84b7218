"""Gradients of the low-rank update, for rows dy of the gradient of y:

  lora_dx   g = s dy_u B_u [rows, R], summed over E; h as in lora_y; dx_u += mask ∘ (g A_u)
  lora_dab  dA_u = g_uᵀ (mask ∘ x_u)    dB_u = dy_uᵀ h_u    (adapters.py)

lora_dx leaves g and h in a workspace, [N, R] in grouped order: in the dtype of the products, in float32 where that is
float16, as they may leave its range. Where there are few tiles, columns of D are split among programs, of which the
first has h too. With gates g and h are multiplied by rows of them, whose gradients are `products`, s (x Aᵀ) ∘ (dy B).
"""

import triton.language as tl

from ctxkern.runtime.triton.device import kernel, wide
from ctxkern.runtime.triton.grouping import rows_at, slots_of, tile_count, tile_range

from .adapters import lora_dab
from .update import add_product, gates_of, inner_product, keys_of, ranks_of, scale_of


@kernel
def _lora_dx_kernel(
    # tensors
    x_ptr,  # [N, D]
    dy_ptr,  # [N, E]
    a_ptr,  # [b, R, D]
    b_ptr,  # [b, E, R]
    dx_ptr,  # [N, D], added to
    g_ptr,  # [N, BLOCK_R], out
    h_ptr,  # [N, BLOCK_R], out
    products_ptr,  # [N, R], out
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
    d_step,  # columns of a part
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
    BLOCK_N: tl.constexpr,  # of D, of dx
    BLOCK_C: tl.constexpr,  # of D and E, of sums
    BLOCK_R: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
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
    factor = scale_of(scales_ptr, slot, scale)
    # [BLOCK_M, BLOCK_R], of g and h
    cells = grouped[:, None].to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    if gate_ptr is not None:
        gate = gates_of(gate_ptr, gate_index_ptr, rows, mask_m, offs_r, mask_r, rank)
    if (dx_ptr is not None) or (g_ptr is not None) or (products_ptr is not None):
        g = inner_product(
            dy_ptr,
            b_ptr + slot * stride_b_0,
            stride_c=stride_b_1,
            stride_r=stride_b_2,
            size=d_out,
            rows=rows,
            mask_m=mask_m,
            offs_r=offs_r,
            mask_r=mask_r,
            keys=keys,
            kept_from=kept_from,
            BLOCK=BLOCK_C,
            DROPOUT=False,
            DTYPE=DTYPE,
            PRECISION=PRECISION,
        )
    if (h_ptr is not None) or (products_ptr is not None):
        if part == 0:
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
                BLOCK=BLOCK_C,
                DROPOUT=DROPOUT,
                DTYPE=DTYPE,
                PRECISION=PRECISION,
            )
            h *= factor
            if products_ptr is not None:
                at = products_ptr + rows[:, None] * rank + offs_r[None, :]
                tl.store(at, h * g, mask=mask_m[:, None] & (offs_r < rank)[None, :])
            if h_ptr is not None:
                if gate_ptr is not None:
                    h *= gate
                tl.store(h_ptr + cells, h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None])
    if (dx_ptr is not None) or (g_ptr is not None):
        g *= factor
        if gate_ptr is not None:
            g *= gate
    if g_ptr is not None:
        if part == 0:
            tl.store(g_ptr + cells, g.to(g_ptr.dtype.element_ty), mask=mask_m[:, None])
    if dx_ptr is not None:
        add_product(
            g,
            a_ptr + slot * stride_a_0,
            dx_ptr,
            stride_r=stride_a_1,
            stride_c=stride_a_2,
            begin=part * d_step,
            end=tl.minimum((part + 1) * d_step, d_in),
            size=d_in,
            rows=rows,
            mask_m=mask_m,
            offs_r=offs_r,
            mask_r=mask_r,
            keys=keys,
            kept_from=kept_from,
            BLOCK=BLOCK_N,
            ADD=ADD,
            DROPOUT=DROPOUT,
            SCALED=SCALED,
            DTYPE=DTYPE,
            PRECISION=PRECISION,
        )


def add_gradients(call, dy, into, adds):
    """Those that `into`, a `Gradients` of `Operand`s, has room for; adds: to the dx that is there."""
    for ranks in call.ranks():
        size = call.tokens, ranks.block
        g = call.buffer(size, call.between) if into.A is not None else None
        h = call.buffer(size, call.between) if into.B is not None else None
        _lora_dx(call, ranks, dy, g, h, into, adds or ranks.first > 0)
        if g is not None or h is not None:
            lora_dab(call, ranks, dy, g, h, into)


def _lora_dx(call, ranks, dy, g, h, into, adds):
    t = call.tile("lora_dx", ranks, call.d_in, max(call.d_in, call.d_out))
    step, parts = call.parts(call.d_in, t.columns) if into.x is not None else (call.d_in, 1)
    call.launch(
        _lora_dx_kernel,
        (call.groups.tiles * parts,),
        ranks,
        dy_ptr=dy,
        dx_ptr=into.x,
        g_ptr=g,
        h_ptr=h,
        products_ptr=into.products,
        d_step=step,
        parts=parts,
        BLOCK_M=call.block,
        BLOCK_N=t.columns,
        BLOCK_C=t.depth,
        ADD=adds,
        **t.launch(),
    )

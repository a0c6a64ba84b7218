"""Panel backward: what surrounds the weights that `_panel_make_kernel` makes; the maths is in panel_kernels.py."""

import triton.language as tl

from ctxkern.runtime.triton.device import dot_wide, kernel, wide
from ctxkern.runtime.triton.grouping import context_count, range_of, rows_at, slots_of, tile_count, tile_range

from .projections import pick, strip_at


@kernel
def _panel_gather_kernel(
    # tensors
    x_ptr,  # [N, D]
    dys,  # of each projection [N, E]
    groups_ptr,
    products_ptr,  # [strips, U, D_BLOCK, width], out: G
    # sizes
    d_outs,
    limit,
    tiles,
    length,
    d_in,
    d_begin,
    d_size,
    width,
    u_begin,
    u_size,
    first_strip,
    # tile
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows at a time
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    u = tl.program_id(1)
    e_blocks = tl.cdiv(width, BLOCK_E)
    block = tl.program_id(0) // e_blocks
    d_blocks = tl.cdiv(d_size, BLOCK_D)
    slot = block // d_blocks
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if (u_begin + u >= context_count(groups_ptr, limit, UNIFORM)) | (e0 >= e_size):
        return
    begin, end = range_of(groups_ptr, limit, length, u_begin + u, UNIFORM)
    offs_d = (block % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_d = offs_d < d_size
    mask_e = offs_e < e_size
    dy_ptr = pick(part, dys)
    d_out = pick(part, d_outs)
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for n in range(begin, end, BLOCK_N):
        grouped = n + tl.arange(0, BLOCK_N)
        mask_n = grouped < end
        rows = rows_at(groups_ptr, limit, tiles, grouped, mask_n, ORDERED).to(tl.int64)
        x_at = x_ptr + rows[:, None] * d_in + (d_begin + offs_d)[None, :]
        x = tl.load(x_at, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        dy_at = dy_ptr + rows[:, None] * d_out + (e_begin + offs_e)[None, :]
        dy = tl.load(dy_at, mask=mask_n[:, None] & mask_e[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
    cells = ((slot * u_size + u) * d_size + offs_d[:, None]).to(tl.int64) * width + offs_e[None, :]
    tl.store(products_ptr + cells, acc.to(products_ptr.dtype.element_ty), mask=mask_d[:, None] & mask_e[None, :])


@kernel
def _panel_dcontext_kernel(
    # tensors
    bilinears,  # of each projection [D, E, K]
    groups_ptr,
    products_ptr,  # [strips, U, D_BLOCK, width]
    partial_ptr,  # [programs, U, K], added to
    # strides
    strides_t,
    # sizes
    d_outs,
    limit,
    context_dim,
    d_begin,
    d_size,
    width,
    u_begin,
    u_size,
    first_strip,
    # tile
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of `_panel_make_kernel` that sums dcontext, for more of K than a program holds: a block of K each."""
    contexts = tl.cdiv(u_size, BLOCK_U)
    pid = tl.program_id(0) // contexts
    e_blocks = tl.cdiv(width, BLOCK_E)
    blocks = e_blocks * tl.cdiv(d_size, ROWS)
    slot = pid // blocks
    block = pid % blocks
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width)
    u0 = (tl.program_id(0) % contexts) * BLOCK_U
    e0 = (block % e_blocks) * BLOCK_E
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    if (u0 >= count) | (e0 >= e_size):
        return
    offs_u = u0 + tl.arange(0, BLOCK_U)
    mask_u = offs_u < count
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    columns = (e_begin + offs_e).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    bilinear_at = pick(part, bilinears) + columns[:, None] * pick(part, strides_t[1])
    bilinear_at += offs_k[None, :] * wide(pick(part, strides_t[2]))
    acc = tl.zeros([BLOCK_U, BLOCK_K], tl.float32)
    first = (block // e_blocks) * ROWS
    for row in range(first, tl.minimum(first + ROWS, d_size)):
        d = (d_begin + row).to(tl.int64)
        t_at = bilinear_at + d * pick(part, strides_t[0])
        t = tl.load(t_at, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
        g = tl.load(products_ptr + cells, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        acc = dot_wide(g, t, acc, PRECISION)
    at = (pid * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
    mask = mask_u[:, None] & mask_k[None, :]
    acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(partial_ptr + at, acc, mask=mask)


@kernel
def _panel_turn_kernel(
    # tensors
    dys,  # of each projection [N, E]
    panel_ptr,  # [strips, U, D_BLOCK, width]: W
    groups_ptr,
    sums_ptr,  # [N, D_BLOCK], float32: the sums of several launches
    dx_ptr,  # [N, D]
    # sizes
    d_outs,
    limit,
    tiles,
    length,
    d_in,
    d_begin,
    d_size,
    width,
    u_begin,
    u_size,
    first_strip,
    strips,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of D
    BLOCK_E: tl.constexpr,
    STARTED: tl.constexpr,  # sums hold earlier launches
    LAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program sums over the columns of all strips of the launch, of all projections."""
    blocks = tl.cdiv(d_size, BLOCK_N)
    tile = tl.program_id(0) // blocks
    if tile >= tile_count(groups_ptr, tiles, UNIFORM):
        return
    u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
    if (u < u_begin) | (u >= u_begin + u_size):
        return
    grouped = begin + tl.arange(0, BLOCK_M)
    mask_m = grouped < end
    rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < d_size
    offs_e = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for slot in range(0, strips):
        part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width)
        dy_at = pick(part, dys) + rows[:, None] * pick(part, d_outs) + (e_begin + offs_e)[None, :]
        # [BLOCK_N, BLOCK_E]
        region = (slot * u_size + u - u_begin) * d_size
        w_at = panel_ptr + (region + offs_n[:, None]).to(tl.int64) * width + offs_e[None, :]
        for e in range(0, e_size, BLOCK_E):
            mask_e = offs_e < e_size - e
            dy = tl.load(dy_at, mask=mask_m[:, None] & mask_e[None, :], other=0.0)
            w = tl.load(w_at, mask=mask_n[:, None] & mask_e[None, :], other=0.0)
            acc = tl.dot(dy, tl.trans(w), acc, input_precision=PRECISION)
            dy_at += BLOCK_E
            w_at += BLOCK_E
    mask = mask_m[:, None] & mask_n[None, :]
    sums = rows[:, None] * d_size + offs_n[None, :]
    if STARTED:
        acc += tl.load(sums_ptr + sums, mask=mask, other=0.0)
    if LAST:
        dx_at = dx_ptr + rows[:, None] * d_in + (d_begin + offs_n)[None, :]
        tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + sums, acc, mask=mask)


@kernel
def _panel_spread_kernel(
    # tensors
    products_ptr,  # [strips, U, D_BLOCK, width]: G
    context_ptr,  # [F, K]
    groups_ptr,
    dbilinears,  # of each projection [D, E, K]
    dweights,  # [D, E] each
    sums_ptr,  # [strips, D_BLOCK, width, K + 1], float32: the sums of several groups
    # strides
    strides_t,
    strides_w,
    # sizes
    d_outs,
    limit,
    context_dim,
    d_begin,
    d_size,
    width,
    u_begin,
    u_size,
    first_strip,
    # tile
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DBILINEAR: tl.constexpr,
    DWEIGHT: tl.constexpr,
    STARTED: tl.constexpr,  # sums hold earlier groups
    LAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    e_blocks = tl.cdiv(width, BLOCK_E)
    slot = tl.program_id(0) // (e_blocks * d_size)
    row = tl.program_id(0) // e_blocks % d_size
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if e0 >= e_size:
        return
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    dweight = tl.zeros([BLOCK_E], tl.float32)
    for u0 in range(0, count, BLOCK_U):
        offs_u = u0 + tl.arange(0, BLOCK_U)
        mask_u = offs_u < count
        table = slots_of(groups_ptr, u_begin + offs_u, mask_u, UNIFORM).to(tl.int64)
        # [BLOCK_U, BLOCK_E]
        cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
        g = tl.load(products_ptr + cells, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        if DBILINEAR:
            c = tl.load(
                context_ptr + table[:, None] * context_dim + offs_k[None, :],
                mask=mask_u[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc = dot_wide(tl.trans(g), c, acc, PRECISION)
        if DWEIGHT:
            dweight += tl.sum(g.to(tl.float32), 0)
    d = (d_begin + row).to(tl.int64)
    columns = (e_begin + offs_e).to(tl.int64)
    sums = ((slot * d_size + row).to(tl.int64) * width + offs_e) * (context_dim + 1)
    if DBILINEAR:
        mask = mask_e[:, None] & mask_k[None, :]
        cells = sums[:, None] + offs_k[None, :]
        if STARTED:
            acc += tl.load(sums_ptr + cells, mask=mask, other=0.0)
        if LAST:
            gradient_at = pick(part, dbilinears) + d * pick(part, strides_t[0])
            gradient_at += columns[:, None] * pick(part, strides_t[1])
            gradient_at += offs_k[None, :] * wide(pick(part, strides_t[2]))
            tl.store(gradient_at, acc.to(dbilinears[0].dtype.element_ty), mask=mask)
        else:
            tl.store(sums_ptr + cells, acc, mask=mask)
    if DWEIGHT:
        if tl.program_id(1) == 0:
            if STARTED:
                dweight += tl.load(sums_ptr + sums + context_dim, mask=mask_e, other=0.0)
            if LAST:
                gradient = pick(part, dweights) + d * pick(part, strides_w[0]) + columns * pick(part, strides_w[1])
                tl.store(gradient, dweight.to(dweights[0].dtype.element_ty), mask=mask_e)
            else:
                tl.store(sums_ptr + sums + context_dim, dweight, mask=mask_e)


@kernel
def _sum_partials_kernel(
    partial_ptr,  # [programs, U, K], float32
    groups_ptr,
    dcontext_ptr,  # [F, K]
    limit,
    context_dim,
    programs,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """dcontext of a context: its partial sums, in a fixed order."""
    u = tl.program_id(0)
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    slot = slots_of(groups_ptr, u, True, UNIFORM)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row = p.to(tl.int64) * limit + u
        mask = (p < programs)[:, None] & mask_k[None, :]
        sums += tl.load(partial_ptr + row[:, None] * context_dim + offs_k[None, :], mask=mask, other=0.0)
    acc = tl.sum(sums, 0)
    at = dcontext_ptr + slot.to(tl.int64) * context_dim + offs_k
    tl.store(at, acc.to(dcontext_ptr.dtype.element_ty), mask=mask_k)

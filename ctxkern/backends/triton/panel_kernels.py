"""Panel: weights of all contexts for a block of D × E, then their products with rows of x or dy; block after block.

  make      W_u[d, e] = weight[d, e] + Σ_k bilinear[d, e, k] c[u, k]    one pass over `bilinear`, all contexts at once
  project   y[n, e] = Σ_d x[n, d] W_u[d, e] + bias[e]                   a tile: rows of one context
  gather    G_u[d, e] = Σ_{n of u} x[n, d] dy[n, e]
  turn      dx[n, d] = Σ_e dy[n, e] W_u[d, e]
  spread    dbilinear[d, e, k] = Σ_u G_u[d, e] c[u, k]    dweight[d, e] = Σ_u G_u[d, e]
  dcontext  dcontext[u, k] = Σ_{d, e} bilinear[d, e, k] G_u[d, e]       in the pass that makes W, a part a program

W and G live in a workspace, [contexts of a group, rows of a block, columns of a block], in the dtype of x. Forward, a
block is all of D by a strip of E, so that no sum crosses blocks; backward, a strip of D by all of E where that fits. No
float atomics.
"""

import triton.language as tl

from .device import dot_rounded, dot_wide, kernel, wide
from .grouping import context_count, range_of, rows_at, slots_of, tile_count, tile_range


@kernel
def _panel_make_kernel(
    # tensors
    bilinear_ptr,  # [D, E, K]
    weight_ptr,  # [D, E]
    context_ptr,  # [F, K]
    groups_ptr,
    panel_ptr,  # [U, D_BLOCK, E_BLOCK], out: W
    products_ptr,  # likewise: G
    partial_ptr,  # [programs, U, K], added to: dcontext
    # strides
    stride_t_d,
    stride_t_e,
    stride_t_k,
    stride_w_d,
    stride_w_e,
    # sizes
    limit,
    context_dim,
    d_begin,
    d_size,
    e_begin,
    e_size,
    u_begin,
    u_size,
    # tile
    ROWS: tl.constexpr,  # of D, a program
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,  # K fits into one block
    HAS_WEIGHT: tl.constexpr,
    MAKE: tl.constexpr,
    DCONTEXT: tl.constexpr,  # only beside WHOLE_K
    UNIFORM: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    e_blocks = tl.cdiv(e_size, BLOCK_E)
    u0 = tl.program_id(1) * BLOCK_U
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    if u0 >= count:
        return
    offs_u = u0 + tl.arange(0, BLOCK_U)
    mask_u = offs_u < count
    slot = slots_of(groups_ptr, u_begin + offs_u, mask_u, UNIFORM).to(tl.int64)
    offs_e = (pid % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    columns = (e_begin + offs_e).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    # [BLOCK_U, BLOCK_K]
    context_at = context_ptr + slot[:, None] * context_dim + offs_k[None, :]
    if WHOLE_K:
        context = tl.load(context_at, mask=mask_u[:, None] & mask_k[None, :], other=0.0)
    if DCONTEXT:
        dcontext = tl.zeros([BLOCK_U, BLOCK_K], tl.float32)
    first = (pid // e_blocks) * ROWS
    for row in range(first, tl.minimum(first + ROWS, d_size)):
        d = (d_begin + row).to(tl.int64)
        # [BLOCK_E, BLOCK_K]
        rows_at_k = bilinear_ptr + d * stride_t_d + columns[:, None] * stride_t_e + offs_k[None, :] * stride_t_k
        # [BLOCK_U, BLOCK_E]
        block = (offs_u[:, None].to(tl.int64) * d_size + row) * e_size + offs_e[None, :]
        mask = mask_u[:, None] & mask_e[None, :]
        if WHOLE_K:
            t = tl.load(rows_at_k, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        if DCONTEXT:
            g = tl.load(products_ptr + block, mask=mask, other=0.0)
            dcontext = dot_wide(g, t, dcontext, PRECISION)
        if MAKE:
            acc = tl.zeros([BLOCK_E, BLOCK_U], tl.float32)
            if WHOLE_K:
                acc = dot_rounded(t, tl.trans(context), acc, DTYPE, PRECISION)
            else:
                for k in range(0, context_dim, BLOCK_K):
                    mask_k = offs_k < context_dim - k
                    c = tl.load(context_at + k, mask=mask_u[:, None] & mask_k[None, :], other=0.0)
                    t = tl.load(rows_at_k + k * stride_t_k, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
                    acc = dot_rounded(t, tl.trans(c), acc, DTYPE, PRECISION)
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + d * stride_w_d + columns * stride_w_e, mask=mask_e, other=0.0)
                acc += w.to(tl.float32)[:, None]
            tl.store(panel_ptr + block, tl.trans(acc).to(DTYPE), mask=mask)
    if DCONTEXT:
        at = (pid * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
        mask = mask_u[:, None] & mask_k[None, :]
        dcontext += tl.load(partial_ptr + at, mask=mask, other=0.0)
        tl.store(partial_ptr + at, dcontext, mask=mask)


@kernel
def _panel_dcontext_kernel(
    # tensors
    bilinear_ptr,
    groups_ptr,
    products_ptr,
    partial_ptr,
    # strides
    stride_t_d,
    stride_t_e,
    stride_t_k,
    # sizes
    limit,
    context_dim,
    d_begin,
    d_size,
    e_begin,
    e_size,
    u_begin,
    u_size,
    # tile
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of `_panel_make_kernel` that sums dcontext, for more of K than a program holds: a block of K each."""
    pid = tl.program_id(0)
    e_blocks = tl.cdiv(e_size, BLOCK_E)
    u0 = tl.program_id(1) * BLOCK_U
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    if u0 >= count:
        return
    offs_u = u0 + tl.arange(0, BLOCK_U)
    mask_u = offs_u < count
    offs_e = (pid % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    columns = (e_begin + offs_e).to(tl.int64)
    offs_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    acc = tl.zeros([BLOCK_U, BLOCK_K], tl.float32)
    first = (pid // e_blocks) * ROWS
    for row in range(first, tl.minimum(first + ROWS, d_size)):
        d = (d_begin + row).to(tl.int64)
        t = tl.load(
            bilinear_ptr + d * stride_t_d + columns[:, None] * stride_t_e + offs_k[None, :] * stride_t_k,
            mask=mask_e[:, None] & mask_k[None, :],
            other=0.0,
        )
        block = (offs_u[:, None].to(tl.int64) * d_size + row) * e_size + offs_e[None, :]
        g = tl.load(products_ptr + block, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        acc = dot_wide(g, t, acc, PRECISION)
    at = (pid * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
    mask = mask_u[:, None] & mask_k[None, :]
    acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(partial_ptr + at, acc, mask=mask)


@kernel
def _panel_project_kernel(
    # tensors
    x_ptr,  # [N, D]
    panel_ptr,  # [U, D, E_BLOCK]
    bias_ptr,  # [E]
    groups_ptr,
    y_ptr,  # [N, E]
    # sizes
    limit,
    tiles,
    length,
    d_in,
    d_out,
    e_begin,
    e_size,
    u_begin,
    u_size,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tile_count(groups_ptr, tiles, UNIFORM):
        return
    u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
    if (u < u_begin) | (u >= u_begin + u_size):
        return
    grouped = begin + tl.arange(0, BLOCK_M)
    mask_m = grouped < end
    rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < e_size
    offs_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + rows[:, None] * d_in + offs_d[None, :]
    w_at = panel_ptr + ((u - u_begin).to(tl.int64) * d_in + offs_d[:, None]) * e_size + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in range(0, d_in, BLOCK_D):
        mask_d = offs_d < d_in - d
        x = tl.load(x_at, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(w_at, mask=mask_d[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += BLOCK_D
        w_at += BLOCK_D * e_size
    if HAS_BIAS:
        acc += tl.load(bias_ptr + e_begin + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + rows[:, None] * d_out + (e_begin + offs_n)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@kernel
def _panel_gather_kernel(
    # tensors
    x_ptr,  # [N, D]
    dy_ptr,  # [N, E]
    groups_ptr,
    products_ptr,  # [U, D_BLOCK, E_BLOCK], out: G
    # sizes
    limit,
    tiles,
    length,
    d_in,
    d_out,
    d_begin,
    d_size,
    e_begin,
    e_size,
    u_begin,
    # tile
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows at a time
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    u = tl.program_id(1)
    if u_begin + u >= context_count(groups_ptr, limit, UNIFORM):
        return
    begin, end = range_of(groups_ptr, limit, length, u_begin + u, UNIFORM)
    e_blocks = tl.cdiv(e_size, BLOCK_E)
    offs_d = (tl.program_id(0) // e_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = (tl.program_id(0) % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_d = offs_d < d_size
    mask_e = offs_e < e_size
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
    block = (u * d_size + offs_d[:, None]).to(tl.int64) * e_size + offs_e[None, :]
    tl.store(products_ptr + block, acc.to(products_ptr.dtype.element_ty), mask=mask_d[:, None] & mask_e[None, :])


@kernel
def _panel_turn_kernel(
    # tensors
    dy_ptr,  # [N, E]
    panel_ptr,  # [U, D_BLOCK, E_BLOCK]
    groups_ptr,
    sums_ptr,  # [N, D_BLOCK], float32: the sums of several blocks
    dx_ptr,  # [N, D]
    # sizes
    limit,
    tiles,
    length,
    d_in,
    d_out,
    d_begin,
    d_size,
    e_begin,
    e_size,
    u_begin,
    u_size,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of D
    BLOCK_E: tl.constexpr,
    STARTED: tl.constexpr,  # sums hold earlier blocks
    LAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tile_count(groups_ptr, tiles, UNIFORM):
        return
    u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
    if (u < u_begin) | (u >= u_begin + u_size):
        return
    grouped = begin + tl.arange(0, BLOCK_M)
    mask_m = grouped < end
    rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < d_size
    offs_e = tl.arange(0, BLOCK_E)
    dy_at = dy_ptr + rows[:, None] * d_out + (e_begin + offs_e)[None, :]
    # [BLOCK_N, BLOCK_E]
    w_at = panel_ptr + ((u - u_begin) * d_size + offs_n[:, None]).to(tl.int64) * e_size + offs_e[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
    products_ptr,  # [U, D_BLOCK, E_BLOCK]
    context_ptr,  # [F, K]
    groups_ptr,
    dbilinear_ptr,  # [D, E, K]
    dweight_ptr,  # [D, E]
    sums_ptr,  # [D_BLOCK, E_BLOCK, K + 1], float32: the sums of several groups
    # strides
    stride_t_d,
    stride_t_e,
    stride_t_k,
    stride_w_d,
    stride_w_e,
    # sizes
    limit,
    context_dim,
    d_begin,
    d_size,
    e_begin,
    e_size,
    u_begin,
    u_size,
    # tile
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DBILINEAR: tl.constexpr,
    DWEIGHT: tl.constexpr,
    STARTED: tl.constexpr,
    LAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    e_blocks = tl.cdiv(e_size, BLOCK_E)
    row = tl.program_id(0) // e_blocks
    offs_e = (tl.program_id(0) % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    dweight = tl.zeros([BLOCK_E], tl.float32)
    for u0 in range(0, count, BLOCK_U):
        offs_u = u0 + tl.arange(0, BLOCK_U)
        mask_u = offs_u < count
        slot = slots_of(groups_ptr, u_begin + offs_u, mask_u, UNIFORM).to(tl.int64)
        # [BLOCK_U, BLOCK_E]
        block = (offs_u[:, None].to(tl.int64) * d_size + row) * e_size + offs_e[None, :]
        g = tl.load(products_ptr + block, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        if DBILINEAR:
            c = tl.load(
                context_ptr + slot[:, None] * context_dim + offs_k[None, :],
                mask=mask_u[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc = dot_wide(tl.trans(g), c, acc, PRECISION)
        if DWEIGHT:
            dweight += tl.sum(g.to(tl.float32), 0)
    d = (d_begin + row).to(tl.int64)
    columns = (e_begin + offs_e).to(tl.int64)
    sums = (row.to(tl.int64) * e_size + offs_e) * (context_dim + 1)
    if DBILINEAR:
        mask = mask_e[:, None] & mask_k[None, :]
        cells = sums[:, None] + offs_k[None, :]
        if STARTED:
            acc += tl.load(sums_ptr + cells, mask=mask, other=0.0)
        if LAST:
            dbilinear_at = dbilinear_ptr + d * stride_t_d + columns[:, None] * stride_t_e + offs_k[None, :] * stride_t_k
            tl.store(dbilinear_at, acc.to(dbilinear_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(sums_ptr + cells, acc, mask=mask)
    if DWEIGHT:
        if tl.program_id(1) == 0:
            if STARTED:
                dweight += tl.load(sums_ptr + sums + context_dim, mask=mask_e, other=0.0)
            if LAST:
                dweight_at = dweight_ptr + d * stride_w_d + columns * stride_w_e
                tl.store(dweight_at, dweight.to(dweight_ptr.dtype.element_ty), mask=mask_e)
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
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """dcontext of a context: its partial sums, in their order."""
    u = tl.program_id(0)
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    slot = slots_of(groups_ptr, u, True, UNIFORM)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    acc = tl.zeros([BLOCK_K], tl.float32)
    for p in range(0, programs):
        acc += tl.load(partial_ptr + (wide(p) * limit + u) * context_dim + offs_k, mask=mask_k, other=0.0)
    at = dcontext_ptr + slot.to(tl.int64) * context_dim + offs_k
    tl.store(at, acc.to(dcontext_ptr.dtype.element_ty), mask=mask_k)

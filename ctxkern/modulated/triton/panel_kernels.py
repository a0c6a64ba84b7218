"""Panel: weights of all contexts for a block of D × E, then their products with rows of x or dy; block after block.

  make      W_u[d, e] = weight[d, e] + Σ_k bilinear[d, e, k] c[u, k]    one pass over `bilinear`, all contexts at once
  project   y[n, e] = Σ_d x[n, d] W_u[d, e] + bias[e]                   a tile: rows of one context

and backward (panel_backward_kernels.py)

  gather    G_u[d, e] = Σ_{n of u} x[n, d] dy[n, e]
  turn      dx[n, d] = Σ_e dy[n, e] W_u[d, e]
  spread    dbilinear[d, e, k] = Σ_u G_u[d, e] c[u, k]    dweight[d, e] = Σ_u G_u[d, e]
  dcontext  dcontext[u, k] = Σ_{d, e} bilinear[d, e, k] G_u[d, e]       in the pass that makes W, a part a program

W and G live in a workspace, [strips of a launch, contexts of a group, rows of a block, width of a strip], in the dtype
of x. Strips are columns of one or several projections (projections.py). Forward, a block is all of D by some strips, so
that no sum crosses blocks; backward, rows of D by all strips where they fit. No float atomics.
"""

import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_rounded, dot_wide, kernel, wide
from ctxkern.runtime.triton.grouping import context_count, rows_at, slots_of, tile_count, tile_range

from .projections import pick, strip_at


@triton.jit
def make_tile(
    # tensors
    bilinears,
    weights,
    context_ptr,
    groups_ptr,
    panel_ptr,
    products_ptr,
    partial_ptr,
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
    # which
    strip,
    slot,
    block,
    u0,
    program,
    # tile
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MAKE: tl.constexpr,
    DCONTEXT: tl.constexpr,
    UNIFORM: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W of a strip, ROWS rows by BLOCK_E columns of it, for the contexts from u0 on, into a slot of the workspace."""
    part, e_begin, e_size = strip_at(strip, d_outs, width)
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    e_blocks = tl.cdiv(width, BLOCK_E)
    e0 = (block % e_blocks) * BLOCK_E
    if (u0 < count) & (e0 < e_size):
        offs_u = u0 + tl.arange(0, BLOCK_U)
        mask_u = offs_u < count
        table = slots_of(groups_ptr, u_begin + offs_u, mask_u, UNIFORM).to(tl.int64)
        offs_e = e0 + tl.arange(0, BLOCK_E)
        mask_e = offs_e < e_size
        columns = (e_begin + offs_e).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = offs_k < context_dim
        # [BLOCK_E, BLOCK_K]
        stride_k = wide(pick(part, strides_t[2]))
        bilinear_at = pick(part, bilinears) + columns[:, None] * pick(part, strides_t[1]) + offs_k[None, :] * stride_k
        if HAS_WEIGHT:
            weight_at = pick(part, weights) + columns * pick(part, strides_w[1])
        # [BLOCK_U, BLOCK_K]
        context_at = context_ptr + table[:, None] * context_dim + offs_k[None, :]
        if WHOLE_K:
            context = tl.load(context_at, mask=mask_u[:, None] & mask_k[None, :], other=0.0)
        if DCONTEXT:
            dcontext = tl.zeros([BLOCK_U, BLOCK_K], tl.float32)
        first = (block // e_blocks) * ROWS
        for row in range(first, tl.minimum(first + ROWS, d_size)):
            d = wide(d_begin + row)
            t_at = bilinear_at + d * pick(part, strides_t[0])
            # [BLOCK_U, BLOCK_E]
            cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
            mask = mask_u[:, None] & mask_e[None, :]
            if WHOLE_K:
                t = tl.load(t_at, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
            if DCONTEXT:
                g = tl.load(products_ptr + cells, mask=mask, other=0.0)
                dcontext = dot_wide(g, t, dcontext, PRECISION)
            if MAKE:
                acc = tl.zeros([BLOCK_E, BLOCK_U], tl.float32)
                if WHOLE_K:
                    acc = dot_rounded(t, tl.trans(context), acc, DTYPE, PRECISION)
                else:
                    for k in range(0, context_dim, BLOCK_K):
                        mask_k = offs_k < context_dim - k
                        c = tl.load(context_at + k, mask=mask_u[:, None] & mask_k[None, :], other=0.0)
                        t = tl.load(t_at + k * stride_k, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
                        acc = dot_rounded(t, tl.trans(c), acc, DTYPE, PRECISION)
                if HAS_WEIGHT:
                    w = tl.load(weight_at + d * pick(part, strides_w[0]), mask=mask_e, other=0.0)
                    acc += w.to(tl.float32)[:, None]
                tl.store(panel_ptr + cells, tl.trans(acc).to(DTYPE), mask=mask)
        if DCONTEXT:
            at = (program * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
            mask = mask_u[:, None] & mask_k[None, :]
            dcontext += tl.load(partial_ptr + at, mask=mask, other=0.0)
            tl.store(partial_ptr + at, dcontext, mask=mask)


@kernel
def _panel_make_kernel(
    # tensors
    bilinears,  # of each projection [D, E, K]
    weights,  # [D, E] each
    context_ptr,  # [F, K]
    groups_ptr,
    panel_ptr,  # [strips, U, D_BLOCK, width], out: W
    products_ptr,  # likewise: G
    partial_ptr,  # [programs, U, K], added to: dcontext
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
    # contexts side by side: they read the same of `bilinear`
    contexts = tl.cdiv(u_size, BLOCK_U)
    pid = tl.program_id(0) // contexts
    blocks = tl.cdiv(width, BLOCK_E) * tl.cdiv(d_size, ROWS)
    slot = pid // blocks
    make_tile(
        bilinears,
        weights,
        context_ptr,
        groups_ptr,
        panel_ptr,
        products_ptr,
        partial_ptr,
        strides_t,
        strides_w,
        d_outs,
        limit,
        context_dim,
        d_begin,
        d_size,
        width,
        u_begin,
        u_size,
        first_strip + slot,
        slot,
        pid % blocks,
        (tl.program_id(0) % contexts) * BLOCK_U,
        pid,
        ROWS,
        BLOCK_E,
        BLOCK_U,
        BLOCK_K,
        WHOLE_K,
        HAS_WEIGHT,
        MAKE,
        DCONTEXT,
        UNIFORM,
        DTYPE,
        PRECISION,
    )


@triton.jit
def project_tile(
    # tensors
    x_ptr,
    panel_ptr,
    biases,
    groups_ptr,
    outs,
    # sizes
    d_outs,
    limit,
    tiles,
    length,
    d_in,
    width,
    u_begin,
    u_size,
    # which
    strip,
    slot,
    n0,
    tile,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of a tile of rows, BLOCK_N columns of a strip, whose W lies in a slot of the workspace."""
    part, e_begin, e_size = strip_at(strip, d_outs, width)
    if (tile < tile_count(groups_ptr, tiles, UNIFORM)) & (n0 < e_size):
        u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
        if (u >= u_begin) & (u < u_begin + u_size):
            grouped = begin + tl.arange(0, BLOCK_M)
            mask_m = grouped < end
            rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask_n = offs_n < e_size
            offs_d = tl.arange(0, BLOCK_D)
            x_at = x_ptr + rows[:, None] * d_in + offs_d[None, :]
            region = (slot * u_size + u - u_begin).to(tl.int64) * d_in
            w_at = panel_ptr + (region + offs_d[:, None]) * width + offs_n[None, :]
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, d_in, BLOCK_D):
                mask_d = offs_d < d_in - d
                x = tl.load(x_at, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
                w = tl.load(w_at, mask=mask_d[:, None] & mask_n[None, :], other=0.0, cache_modifier=".cg")
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
                x_at += BLOCK_D
                w_at += BLOCK_D * width
            if HAS_BIAS:
                bias_at = pick(part, biases) + e_begin + offs_n
                acc += tl.load(bias_at, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            y_at = pick(part, outs) + rows[:, None] * pick(part, d_outs) + (e_begin + offs_n)[None, :]
            tl.store(y_at, acc.to(x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@kernel
def _panel_project_kernel(
    # tensors
    x_ptr,  # [N, D]
    panel_ptr,  # [strips, U, D, width]
    biases,  # of each projection [E]
    groups_ptr,
    outs,  # [N, E] each
    # sizes
    d_outs,
    limit,
    tiles,
    length,
    d_in,
    width,
    u_begin,
    u_size,
    first_strip,
    strips,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs of the same rows follow each other, so that x is read once."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK_N)
    column = pid % (blocks * strips)
    slot = column // blocks
    project_tile(
        x_ptr,
        panel_ptr,
        biases,
        groups_ptr,
        outs,
        d_outs,
        limit,
        tiles,
        length,
        d_in,
        width,
        u_begin,
        u_size,
        first_strip + slot,
        slot,
        (column % blocks) * BLOCK_N,
        pid // (blocks * strips),
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        HAS_BIAS,
        UNIFORM,
        ORDERED,
        PRECISION,
    )

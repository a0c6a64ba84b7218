"""Outer: the product of a row of x with its context is the operand, made in registers; no weight is made at all.

  forward   y[n, e] = Σ_d Σ_k (x[n, d] c[n, k]) bilinear[d, e, k] + Σ_d x[n, d] weight[d, e] + bias[e]
  turn      z[n, k] = Σ_e dy[n, e] bilinear[d, e, k] for one d
            dx[n, d] = Σ_k z[n, k] c[n, k]    dcontext[n, k] += x[n, d] z[n, k]
  spread    dbilinear[d, e, k] = Σ_n (x[n, d] dy[n, e]) c[n, k]

Rows stay in their order; `slot` [N] is the row of the context table of each, none for a context per token. `bilinear`
is read once for a tile of rows, which are few where this form wins. Sums that several programs share are kept apart and
added in order. Projections of the same rows share launches: a program takes one of them, or sums over all of them.
"""

import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_exact, kernel, wide
from ctxkern.runtime.triton.grouping import context_count, range_of, rows_at, slots_of

from .projections import columns_before, pick


@triton.jit
def _slots(slot_ptr, rows, mask, SLOTS: tl.constexpr):
    slot = rows
    if SLOTS:
        slot = tl.load(slot_ptr + rows, mask=mask, other=0)
    return slot.to(tl.int64)


@kernel
def _outer_forward_kernel(
    # tensors
    x_ptr,  # [N, D]
    context_ptr,  # [F, K]
    slot_ptr,  # [N]
    weights,  # of each projection [D, E]
    bilinears,  # [D, E, K] each
    biases,  # [E] each
    outs,  # [N, E] each
    sums_ptr,  # with SPLIT: [splits, N, E] of each, one after another, float32
    # strides
    strides_t,
    strides_w,
    # sizes
    d_outs,
    rows,
    d_in,
    context_dim,
    d_step,  # of D, a split
    row_blocks,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(2)
    d_out = pick(part, d_outs)
    # rows side by side: they read the same of `bilinear`
    e0 = (tl.program_id(0) // row_blocks) * BLOCK_E
    if e0 >= d_out:
        return
    offs_m = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    slot = _slots(slot_ptr, offs_m, mask_m, SLOTS)
    n = offs_m.to(tl.int64)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < d_out
    d_begin = tl.program_id(1) * d_step
    d_end = tl.minimum(d_begin + d_step, d_in)
    stride_t_d = pick(part, strides_t[0])
    # [1, BLOCK_E]
    bilinear_at = pick(part, bilinears) + offs_e[None, :].to(tl.int64) * pick(part, strides_t[1])
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for k in range(0, context_dim, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < context_dim
        c_at = context_ptr + slot[:, None] * context_dim + offs_k[None, :]
        c = tl.load(c_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        # [BLOCK_K, BLOCK_E]
        t_at = bilinear_at + offs_k[:, None] * wide(pick(part, strides_t[2]))
        for d in range(d_begin, d_end):
            x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
            t = tl.load(t_at + wide(d) * stride_t_d, mask=mask_k[:, None] & mask_e[None, :], other=0.0)
            acc = tl.dot((x[:, None] * c).to(DTYPE), t.to(DTYPE), acc, input_precision=PRECISION)
    if HAS_WEIGHT:
        for d in range(d_begin, d_end, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < d_end
            x = tl.load(x_ptr + n[:, None] * d_in + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            w_at = pick(part, weights) + offs_d[:, None].to(tl.int64) * pick(part, strides_w[0])
            w_at += offs_e[None, :] * wide(pick(part, strides_w[1]))
            w = tl.load(w_at, mask=mask_d[:, None] & mask_e[None, :], other=0.0)
            acc = tl.dot(x, w.to(DTYPE), acc, input_precision=PRECISION)
    mask = mask_m[:, None] & mask_e[None, :]
    if SPLIT:
        sums_at = sums_ptr + tl.num_programs(1).to(tl.int64) * rows * columns_before(part, d_outs)
        at = (tl.program_id(1).to(tl.int64) * rows + n[:, None]) * d_out + offs_e[None, :]
        tl.store(sums_at + at, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(pick(part, biases) + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        y_at = pick(part, outs) + n[:, None] * d_out + offs_e[None, :]
        tl.store(y_at, acc.to(x_ptr.dtype.element_ty), mask=mask)


@kernel
def _outer_sum_kernel(
    sums_ptr,  # [splits, N, E] of each projection, one after another, float32
    biases,  # [E] each
    outs,  # [N, E] each
    d_outs,
    rows,
    splits,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    part = tl.program_id(1)
    d_out = pick(part, d_outs)
    size = wide(rows) * d_out
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    sums_at = sums_ptr + wide(splits) * rows * columns_before(part, d_outs) + offs
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(0, splits):
        acc += tl.load(sums_at + wide(s) * size, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(pick(part, biases) + offs % d_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(pick(part, outs) + offs, acc.to(outs[0].dtype.element_ty), mask=mask)


@kernel
def _outer_turn_kernel(
    # tensors
    x_ptr,  # [N, D]
    dys,  # of each projection [N, E]
    context_ptr,  # [F, K]
    slot_ptr,  # [N]
    bilinears,  # [D, E, K] each
    sums_ptr,  # [N, D], float32: dx so far
    dx_ptr,  # [N, D]
    partial_ptr,  # [ranges of D, N, K], float32: dcontext
    # strides
    strides_t,
    # sizes
    d_outs,
    rows,
    d_in,
    context_dim,
    k_begin,
    d_step,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DX: tl.constexpr,
    DCONTEXT: tl.constexpr,
    STARTED: tl.constexpr,
    LAST: tl.constexpr,
    ADDED: tl.constexpr,  # partial sums hold those of earlier launches
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    slot = _slots(slot_ptr, offs_m, mask_m, SLOTS)
    n = offs_m.to(tl.int64)
    offs_k = k_begin + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    mask = mask_m[:, None] & mask_k[None, :]
    if DX:
        c = tl.load(context_ptr + slot[:, None] * context_dim + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    partial_at = partial_ptr
    if DCONTEXT:
        span = tl.program_id(1).to(tl.int64) * rows
        partial_at = partial_ptr + (span + n[:, None]) * context_dim + offs_k[None, :]
        dcontext = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if ADDED:
            dcontext = tl.load(partial_at, mask=mask, other=0.0)
    d_begin = tl.program_id(1) * d_step
    for d in range(d_begin, tl.minimum(d_begin + d_step, d_in)):
        z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        rest = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for part in range(0, len(d_outs)):
            d_out = pick(part, d_outs)
            bilinear_at = pick(part, bilinears) + wide(d) * pick(part, strides_t[0])
            for e in range(0, d_out, BLOCK_E):
                offs_e = e + tl.arange(0, BLOCK_E)
                mask_e = offs_e < d_out
                dy_at = pick(part, dys) + n[:, None] * d_out + offs_e[None, :]
                dy = tl.load(dy_at, mask=mask_m[:, None] & mask_e[None, :], other=0.0)
                # [BLOCK_E, BLOCK_K]
                t_at = bilinear_at + offs_e[:, None].to(tl.int64) * pick(part, strides_t[1])
                t_at += offs_k[None, :] * wide(pick(part, strides_t[2]))
                t = tl.load(t_at, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
                z, rest = dot_exact(dy, t, z, rest, PRECISION)
        z += rest
        if DX:
            total = tl.sum(z * c, 1)
            if STARTED:
                total += tl.load(sums_ptr + n * d_in + d, mask=mask_m, other=0.0)
            if LAST:
                tl.store(dx_ptr + n * d_in + d, total.to(dx_ptr.dtype.element_ty), mask=mask_m)
            else:
                tl.store(sums_ptr + n * d_in + d, total, mask=mask_m)
        if DCONTEXT:
            x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
            dcontext += x[:, None] * z
    if DCONTEXT:
        tl.store(partial_at, dcontext, mask=mask)


@kernel
def _outer_dcontext_kernel(
    partial_ptr,  # [ranges of D, N, K], float32
    groups_ptr,
    dcontext_ptr,  # [F, K]
    limit,
    tiles,
    length,
    rows,
    context_dim,
    spans,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """dcontext of a context: the partial sums of its rows, in a fixed order."""
    u = tl.program_id(0)
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    begin, end = range_of(groups_ptr, limit, length, u, UNIFORM)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(begin, end, BLOCK_M):
        grouped = start + tl.arange(0, BLOCK_M)
        mask_m = grouped < end
        n = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
        for span in range(0, spans):
            at = (wide(span) * rows + n[:, None]) * context_dim + offs_k[None, :]
            sums += tl.load(partial_ptr + at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
    acc = tl.sum(sums, 0)
    slot = slots_of(groups_ptr, u, True, UNIFORM)
    at = dcontext_ptr + slot.to(tl.int64) * context_dim + offs_k
    tl.store(at, acc.to(dcontext_ptr.dtype.element_ty), mask=mask_k)


@kernel
def _outer_spread_kernel(
    # tensors
    x_ptr,  # [N, D]
    dys,  # of each projection [N, E]
    context_ptr,  # [F, K]
    slot_ptr,  # [N]
    dbilinears,  # [D, E, K] each
    # strides
    strides_t,
    # sizes
    d_outs,
    rows,
    d_in,
    context_dim,
    e_blocks,  # of the widest projection
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(2)
    d_out = pick(part, d_outs)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if e0 >= d_out:
        return
    d = (tl.program_id(0) // e_blocks).to(tl.int64)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < d_out
    dy_ptr = pick(part, dys)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        slot = _slots(slot_ptr, offs_m, mask_m, SLOTS)
        n = offs_m.to(tl.int64)
        x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
        dy_at = dy_ptr + n[:, None] * d_out + offs_e[None, :]
        dy = tl.load(dy_at, mask=mask_m[:, None] & mask_e[None, :], other=0.0).to(tl.float32)
        c_at = context_ptr + slot[:, None] * context_dim + offs_k[None, :]
        c = tl.load(c_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        # beside float32 contexts the product is theirs: rounding it would be the only rounding
        acc = tl.dot(tl.trans((x[:, None] * dy).to(c.dtype)), c, acc, input_precision=PRECISION)
    at = pick(part, dbilinears) + d * pick(part, strides_t[0]) + offs_e[:, None].to(tl.int64) * pick(part, strides_t[1])
    at += offs_k[None, :] * wide(pick(part, strides_t[2]))
    tl.store(at, acc.to(dbilinears[0].dtype.element_ty), mask=mask_e[:, None] & mask_k[None, :])


@kernel
def _product_kernel(
    # tensors
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    out_ptr,  # [M, N]
    # strides
    stride_a_m,
    stride_a_k,
    stride_b_k,
    stride_b_n,
    stride_out_m,
    stride_out_n,
    # sizes
    m,
    n,
    k,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,  # to what is there
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of `weight`: for dx, dy weight^T; for dweight, x^T dy."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < m
    mask_n = offs_n < n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < k
        a_at = a_ptr + offs_m[:, None] * stride_a_m + offs_k[None, :] * stride_a_k
        b_at = b_ptr + offs_k[:, None] * stride_b_k + offs_n[None, :] * stride_b_n
        a = tl.load(a_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_at, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)
    at = out_ptr + offs_m[:, None] * stride_out_m + offs_n[None, :] * stride_out_n
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)

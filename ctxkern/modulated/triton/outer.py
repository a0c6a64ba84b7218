"""Outer: the product of a row of x with its context is the operand, made in registers; no weight is made at all.

  outer_y          y[n, e] = Σ_d Σ_k (x[n, d] c[n, k]) bilinear[d, e, k] + Σ_d x[n, d] weight[d, e] + bias[e]

and backward (outer_backward.py, outer_parameters.py)

  outer_dx         z[n, k] = Σ_e dy[n, e] bilinear[d, e, k] for one d
                   dx[n, d] = Σ_k z[n, k] c[n, k]    dcontext[n, k] += x[n, d] z[n, k]
  outer_dbilinear  dbilinear[d, e, k] = Σ_n (x[n, d] dy[n, e]) c[n, k]
  matmul           dweight = xᵀ dy, and dy weightᵀ, which outer_dx adds to

Rows stay in their order; `slot` [N] is the row of the context table of each, none for a context per token. `bilinear`
is read once for a tile of rows, which are few where this form wins. Sums that several programs share are kept apart and
added in order. Projections of the same rows share launches: a program takes one of them, or sums over all of them.

Products of two float16 leave their range, so they are scaled by powers of two, one per row. A sum over D · K terms is
not one chain of additions, which would round more than the einsum's sums over K and then D: every few rows of D begin
at zero. Next to what rounding operands to bfloat16 costs that is nothing.
"""

import torch
import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_rounded, kernel, scale_to_float16, whole, wide
from ctxkern.runtime.triton.sizes import OPTIONS, cdiv
from ctxkern.runtime.triton.tiles import clip, splits, tile

from .projections import columns_before, pick, together

# rows of D whose sums begin at zero
_CHUNK = 16


@triton.jit
def slots_of_rows(slot_ptr, rows, mask, SLOTS: tl.constexpr):
    """Rows of the context table."""
    slot = rows
    if SLOTS:
        slot = tl.load(slot_ptr + rows, mask=mask, other=0)
    return slot.to(tl.int64)


@kernel
def _outer_y_kernel(
    # tensors
    x_ptr,  # [N, D]
    context_ptr,  # [F, K]
    slot_ptr,  # [N]
    weights,  # of each projection [D, E]
    bilinears,  # [D, E, K] each
    biases,  # [E] each
    outs,  # [N, E] each
    partial_ptr,  # with SPLIT: [splits, N, E] of each, one after another, float32
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
    CHUNK: tl.constexpr,  # of D, whose sums begin at zero; 0: all of a split
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,  # products are float16
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(2)
    d_in = whole(d_in, UNIT=UNIT)
    d_out = whole(pick(part, d_outs), UNIT=UNIT)
    # neighbours differ in their rows: they read the same of `bilinear`
    e0 = (tl.program_id(0) // row_blocks) * BLOCK_E
    if e0 >= d_out:
        return
    offs_m = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    slot = slots_of_rows(slot_ptr, offs_m, mask_m, SLOTS=SLOTS)
    n = offs_m.to(tl.int64)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < d_out
    d_begin = tl.program_id(1) * d_step
    d_end = tl.minimum(d_begin + d_step, d_in)
    stride_t_d = pick(part, strides_t[0])
    # [1, BLOCK_E]
    bilinear_at = pick(part, bilinears) + offs_e[None, :].to(tl.int64) * pick(part, strides_t[1])
    # [BLOCK_M, BLOCK_E]
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for k in range(0, context_dim, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < context_dim
        # [BLOCK_M, BLOCK_K]
        c_at = context_ptr + slot[:, None] * context_dim + offs_k[None, :]
        c = tl.load(c_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        # [BLOCK_K, BLOCK_E]
        t_at = bilinear_at + offs_k[:, None] * wide(pick(part, strides_t[2]))
        for first in range(d_begin, d_end, CHUNK if CHUNK > 0 else d_step):
            last = d_end
            if CHUNK > 0:
                last = tl.minimum(first + CHUNK, d_end)
            if SCALED:
                offs_d = first + tl.arange(0, CHUNK)
                mask = mask_m[:, None] & (offs_d < last)[None, :]
                xs = tl.load(x_ptr + n[:, None] * d_in + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
                scale, inverse = scale_to_float16(tl.max(tl.abs(xs), 1) * tl.max(tl.abs(c), 1))
            sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
            for d in range(first, last):
                x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
                if SCALED:
                    x *= scale
                t = tl.load(t_at + wide(d) * stride_t_d, mask=mask_k[:, None] & mask_e[None, :], other=0.0)
                sums = dot_rounded(x[:, None] * c, t, sums, DTYPE=DTYPE, PRECISION=PRECISION)
            acc += sums * inverse[:, None] if SCALED else sums
    if HAS_WEIGHT:
        for d in range(d_begin, d_end, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < d_end
            x = tl.load(x_ptr + n[:, None] * d_in + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            w_at = pick(part, weights) + offs_d[:, None].to(tl.int64) * pick(part, strides_w[0])
            w_at += offs_e[None, :] * wide(pick(part, strides_w[1]))
            w = tl.load(w_at, mask=mask_d[:, None] & mask_e[None, :], other=0.0)
            acc = dot_rounded(x, w, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    mask = mask_m[:, None] & mask_e[None, :]
    if SPLIT:
        partial_at = partial_ptr + tl.num_programs(1).to(tl.int64) * rows * columns_before(part, d_outs)
        at = (tl.program_id(1).to(tl.int64) * rows + n[:, None]) * d_out + offs_e[None, :]
        tl.store(partial_at + at, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(pick(part, biases) + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        y_at = pick(part, outs) + n[:, None] * d_out + offs_e[None, :]
        tl.store(y_at, acc.to(x_ptr.dtype.element_ty), mask=mask)


@kernel
def _outer_y_sum_kernel(
    # tensors
    partial_ptr,  # [splits, N, E] of each projection, one after another, float32
    biases,  # [E] each
    outs,  # [N, E] each
    # sizes
    d_outs,
    rows,
    splits,
    # tile
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    part = tl.program_id(1)
    d_out = pick(part, d_outs)
    size = wide(rows) * d_out
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    partial_at = partial_ptr + wide(splits) * rows * columns_before(part, d_outs) + offs
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(0, splits):
        acc += tl.load(partial_at + wide(s) * size, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(pick(part, biases) + offs % d_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(pick(part, outs) + offs, acc.to(outs[0].dtype.element_ty), mask=mask)


def forward(call, projections):
    """y of each `Projection` into its rows."""
    for alike in together(projections):
        _outer_y(call, alike)


def steps_of(size, parts, least=16):
    """(rows of D per part, parts): rows begin at multiples of `least`; of 16 keeps them aligned."""
    step = least * cdiv(size, least * parts)
    return step, cdiv(size, step)


def _outer_y(call, alike):
    n, k = len(alike.members), call.context_dim
    t = tile("outer_y", *call.target, call.tokens, alike.widest, k)
    row_blocks = cdiv(call.tokens, t.rows)
    tiles = row_blocks * cdiv(alike.widest, t.columns)
    size = call.tokens * sum(alike.d_outs)
    step, parts = steps_of(call.d_in, splits(call.d_in, tiles * n, 4 * size, call.budget))
    partial = call.buffer(parts * size, torch.float32) if parts > 1 else None
    call.launch(
        _outer_y_kernel,
        grid=(tiles, parts, n),
        x_ptr=call.x,
        context_ptr=call.context,
        slot_ptr=call.slot,
        weights=alike.weight,
        bilinears=alike.bilinear,
        biases=alike.bias,
        outs=alike.rows,
        partial_ptr=partial,
        strides_t=alike.strides("bilinear"),
        strides_w=alike.strides("weight"),
        d_outs=alike.d_outs,
        rows=call.tokens,
        d_in=call.d_in,
        context_dim=k,
        d_step=step,
        row_blocks=row_blocks,
        BLOCK_M=t.rows,
        BLOCK_E=t.columns,
        BLOCK_K=t.depth,
        BLOCK_D=clip(step, 64),
        CHUNK=0 if call.compute is torch.bfloat16 else _CHUNK,
        HAS_WEIGHT=alike.weight is not None,
        HAS_BIAS=alike.bias is not None,
        SLOTS=call.slot is not None,
        SPLIT=parts > 1,
        SCALED=call.compute is torch.float16,
        UNIT=call.unit,
        **call.products,
        **t.launch(),
    )
    if parts > 1:
        block = 1024
        call.launch(
            _outer_y_sum_kernel,
            grid=(cdiv(call.tokens * alike.widest, block), n),
            partial_ptr=partial,
            biases=alike.bias,
            outs=alike.rows,
            d_outs=alike.d_outs,
            rows=call.tokens,
            splits=parts,
            BLOCK=block,
            HAS_BIAS=alike.bias is not None,
            **OPTIONS,
        )

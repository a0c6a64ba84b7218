"""Outer backward: dbilinear, and the plain products of weight; the maths is in outer.py."""

import math

import torch
import triton
import triton.language as tl

from ctxkern.runtime.triton.device import dot_rounded, kernel, scale_to_float16, whole, wide
from ctxkern.runtime.triton.sizes import cdiv
from ctxkern.runtime.triton.tiles import PROGRAMS, tile

from .call import TL_DTYPES
from .outer import slots_of_rows
from .projections import pick

# rows of D that a program of outer_dbilinear has at most
DBILINEAR_ROWS = 8


@triton.jit
def _rows_of(
    dy_ptr,
    context_ptr,
    slot_ptr,
    start,
    rows,
    d_out,
    context_dim,
    offs_e,
    mask_e,
    offs_k,
    mask_k,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Rows from `start` on: which, whether they exist, their dy [BLOCK_M, BLOCK_E] and contexts [BLOCK_M, BLOCK_K]."""
    offs_m = start + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    slot = slots_of_rows(slot_ptr, offs_m, mask_m, SLOTS=SLOTS)
    n = offs_m.to(tl.int64)
    dy_at = dy_ptr + n[:, None] * d_out + offs_e[None, :]
    dy = tl.load(dy_at, mask=mask_m[:, None] & mask_e[None, :], other=0.0).to(tl.float32)
    c_at = context_ptr + slot[:, None] * context_dim + offs_k[None, :]
    c = tl.load(c_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
    return n, mask_m, dy, c


@triton.jit
def _add_rows(x, dy, c, acc, SCALED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BLOCK_E, BLOCK_K] + (x dy)^T c."""
    # [BLOCK_M, BLOCK_E]
    product = x[:, None] * dy
    if SCALED:
        scale, inverse = scale_to_float16(tl.max(tl.abs(product), 0))
        sums = tl.dot(tl.trans((product * scale[None, :]).to(tl.float16)), c, input_precision=PRECISION)
        acc += sums * inverse[:, None]
    elif c.dtype == tl.float32:
        # rounding the product would be the only rounding
        acc = tl.dot(tl.trans(product), c, acc, input_precision=PRECISION)
    else:
        acc = dot_rounded(tl.trans(product.to(DTYPE)), c, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    return acc


@kernel
def _outer_dbilinear_kernel(
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
    ROWS: tl.constexpr,  # of D, per program
    WHOLE_N: tl.constexpr,  # all rows of x fit into one block
    SLOTS: tl.constexpr,
    SCALED: tl.constexpr,  # products are float16
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(2)
    d_out = whole(pick(part, d_outs), UNIT=UNIT)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if e0 >= d_out:
        return
    first = (tl.program_id(0) // e_blocks) * ROWS
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < d_out
    dy_ptr = pick(part, dys)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    # [BLOCK_E, BLOCK_K]
    at = pick(part, dbilinears) + offs_e[:, None].to(tl.int64) * pick(part, strides_t[1])
    at += offs_k[None, :] * wide(pick(part, strides_t[2]))
    mask = mask_e[:, None] & mask_k[None, :]
    if WHOLE_N:
        n, mask_m, dy, c = _rows_of(
            dy_ptr=dy_ptr,
            context_ptr=context_ptr,
            slot_ptr=slot_ptr,
            start=0,
            rows=rows,
            d_out=d_out,
            context_dim=context_dim,
            offs_e=offs_e,
            mask_e=mask_e,
            offs_k=offs_k,
            mask_k=mask_k,
            BLOCK_M=BLOCK_M,
            SLOTS=SLOTS,
        )
    for row in range(first, tl.minimum(first + ROWS, d_in)):
        d = wide(row)
        acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
        if WHOLE_N:
            x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
            acc = _add_rows(x, dy, c, acc, SCALED=SCALED, DTYPE=DTYPE, PRECISION=PRECISION)
        else:
            for start in range(0, rows, BLOCK_M):
                n, mask_m, dy, c = _rows_of(
                    dy_ptr=dy_ptr,
                    context_ptr=context_ptr,
                    slot_ptr=slot_ptr,
                    start=start,
                    rows=rows,
                    d_out=d_out,
                    context_dim=context_dim,
                    offs_e=offs_e,
                    mask_e=mask_e,
                    offs_k=offs_k,
                    mask_k=mask_k,
                    BLOCK_M=BLOCK_M,
                    SLOTS=SLOTS,
                )
                x = tl.load(x_ptr + n * d_in + d, mask=mask_m, other=0.0).to(tl.float32)
                acc = _add_rows(x, dy, c, acc, SCALED=SCALED, DTYPE=DTYPE, PRECISION=PRECISION)
        tl.store(at + d * pick(part, strides_t[0]), acc.to(dbilinears[0].dtype.element_ty), mask=mask)


@kernel
def _matmul_kernel(
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
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < k
        a_at = a_ptr + offs_m[:, None] * stride_a_m + offs_k[None, :] * stride_a_k
        b_at = b_ptr + offs_k[:, None] * stride_b_k + offs_n[None, :] * stride_b_n
        a = tl.load(a_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_at, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot_rounded(a, b, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    at = out_ptr + offs_m[:, None] * stride_out_m + offs_n[None, :] * stride_out_n
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def matmul(call, a, b, out, add):
    """a @ b into `out`, or on top of what is there."""
    (m, k), n = a.shape, b.shape[1]
    t = tile("matmul", *call.target, m, n, k)
    call.launch(
        _matmul_kernel,
        grid=(cdiv(m, t.rows), cdiv(n, t.columns)),
        a_ptr=a,
        b_ptr=b,
        out_ptr=out,
        stride_a_m=a.strides[0],
        stride_a_k=a.strides[1],
        stride_b_k=b.strides[0],
        stride_b_n=b.strides[1],
        stride_out_m=out.strides[0],
        stride_out_n=out.strides[1],
        m=m,
        n=n,
        k=k,
        BLOCK_M=t.rows,
        BLOCK_N=t.columns,
        BLOCK_K=t.depth,
        ADD=add,
        DTYPE=TL_DTYPES[call.dtype if a.dtype is b.dtype else call.compute],
        PRECISION=call.precision,
        **t.launch(),
    )


def outer_dbilinear(call, alike):
    k = call.context_dim
    t = tile("outer_dbilinear", *call.target, alike.widest, k, call.tokens)
    e_blocks = cdiv(alike.widest, t.rows)
    grid = e_blocks, cdiv(k, t.columns), len(alike.members)
    # several rows of D share what is read of dy and of contexts, if that is one block and programs enough are left
    rows, one_block = 1, call.tokens <= t.depth
    if one_block:
        rows = max(1, min(DBILINEAR_ROWS, call.d_in * math.prod(grid) // (8 * PROGRAMS)))
    call.launch(
        _outer_dbilinear_kernel,
        grid=(cdiv(call.d_in, rows) * e_blocks, *grid[1:]),
        x_ptr=call.x,
        dys=alike.rows,
        context_ptr=call.context,
        slot_ptr=call.slot,
        dbilinears=alike.dbilinear,
        strides_t=alike.strides("dbilinear"),
        d_outs=alike.d_outs,
        rows=call.tokens,
        d_in=call.d_in,
        context_dim=k,
        e_blocks=e_blocks,
        BLOCK_M=t.depth,
        BLOCK_E=t.rows,
        BLOCK_K=t.columns,
        ROWS=rows,
        WHOLE_N=one_block,
        SLOTS=call.slot is not None,
        SCALED=call.compute is torch.float16,
        UNIT=call.unit,
        **call.products,
        **t.launch(),
    )

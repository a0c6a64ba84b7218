"""Outer backward: dx with dcontext, and the order of it all; the maths is in outer.py."""

import torch
import triton.language as tl

from ctxkern.runtime.triton.device import dot_exact, kernel, whole, wide
from ctxkern.runtime.triton.grouping import context_count, range_of, rows_at, slots_of
from ctxkern.runtime.triton.sizes import OPTIONS, cdiv
from ctxkern.runtime.triton.tiles import clip, splits, tile

from .outer import slots_of_rows, steps_of
from .outer_parameters import matmul, outer_dbilinear
from .projections import pick, together

# rows of D that a program of outer_dx has at least
DX_ROWS = 4


@kernel
def _outer_dx_kernel(
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
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    slot = slots_of_rows(slot_ptr, offs_m, mask_m, SLOTS=SLOTS)
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
        # [BLOCK_M, BLOCK_K]
        z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        rest = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for part in range(0, len(d_outs)):
            d_out = whole(pick(part, d_outs), UNIT=UNIT)
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
                z, rest = dot_exact(dy, t, z, rest, DTYPE=DTYPE, PRECISION=PRECISION)
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
def _outer_dcontext_sum_kernel(
    # tensors
    partial_ptr,  # [ranges of D, N, K], float32
    dcontext_ptr,  # [F, K]
    # sizes
    rows,
    context_dim,
    spans,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # tile
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
    # rows of the context, and parts of each
    for start in range(0, (end - begin) * spans, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        grouped = begin + place // spans
        mask_m = grouped < end
        n = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
        at = ((place % spans).to(tl.int64) * rows + n)[:, None] * context_dim + offs_k[None, :]
        sums += tl.load(partial_ptr + at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
    acc = tl.sum(sums, 0)
    slot = slots_of(groups_ptr, u, True, UNIFORM)
    at = dcontext_ptr + slot.to(tl.int64) * context_dim + offs_k
    tl.store(at, acc.to(dcontext_ptr.dtype.element_ty), mask=mask_k)


def backward(call, projections, dx, dcontext):
    """The gradients into tensors of theirs; None: not asked for."""
    projections = [p._replace(rows=p.rows.matrix()) for p in projections]
    batches = together(projections)
    for alike in batches:
        if alike.dweight is not None:
            for p in alike.members:
                matmul(call, call.x.t(), p.rows, p.dweight, False)
        if alike.dbilinear is not None and call.context_dim:
            outer_dbilinear(call, alike)
    if dx is not None or dcontext is not None:
        _outer_dx(call, batches, dx, dcontext)


def _outer_dx(call, batches, dx, dcontext):
    """dx and the parts of dcontext, which are summed for each context."""
    k = call.context_dim
    t = tile("outer_dx", *call.target, call.tokens, k, max(alike.widest for alike in batches))
    tiles = cdiv(call.tokens, t.rows)
    # without contexts dx is weight's part alone, which the kernel still writes
    pieces = [(alike, at) for alike in batches for at in range(0, max(k, 1), t.columns)]
    weighted = [] if dx is None else [p for alike in batches for p in alike.members if p.weight is not None]
    sums = None
    if weighted or dx is not None and len(pieces) > 1:
        sums = call.buffer((call.tokens, call.d_in), torch.float32)
    for at, p in enumerate(weighted):
        matmul(call, p.rows, p.weight.t(), sums, at > 0)
    wanted = splits(call.d_in, tiles, 4 * call.tokens * k, call.budget, DX_ROWS)
    step, parts = steps_of(call.d_in, wanted, DX_ROWS)
    partial = None if dcontext is None else call.buffer(parts * call.tokens * k, torch.float32)
    for piece, (alike, k_begin) in enumerate(pieces):
        call.launch(
            _outer_dx_kernel,
            grid=(tiles, parts),
            x_ptr=call.x,
            dys=alike.rows,
            context_ptr=call.context,
            slot_ptr=call.slot,
            bilinears=alike.bilinear,
            sums_ptr=sums,
            dx_ptr=dx,
            partial_ptr=partial,
            strides_t=alike.strides("bilinear"),
            d_outs=alike.d_outs,
            rows=call.tokens,
            d_in=call.d_in,
            context_dim=k,
            k_begin=k_begin,
            d_step=step,
            BLOCK_M=t.rows,
            BLOCK_E=t.depth,
            BLOCK_K=t.columns,
            DX=dx is not None,
            DCONTEXT=dcontext is not None,
            STARTED=bool(weighted) or piece > 0,
            LAST=piece + 1 == len(pieces),
            ADDED=alike is not batches[0],
            SLOTS=call.slot is not None,
            UNIT=call.unit,
            **call.products,
            **t.launch(),
        )
    if dcontext is not None and k:
        block_k = clip(k, 128)
        call.launch(
            _outer_dcontext_sum_kernel,
            grid=(call.groups.limit, cdiv(k, block_k)),
            partial_ptr=partial,
            dcontext_ptr=dcontext,
            rows=call.tokens,
            context_dim=k,
            spans=parts,
            **call.groups.arguments(),
            BLOCK_M=32,
            BLOCK_K=block_k,
            **OPTIONS,
        )

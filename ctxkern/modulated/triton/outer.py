"""Outer, launched: how rows, columns and sums are cut; the maths is in outer_kernels.py."""

import torch

from ctxkern.runtime.triton.sizes import OPTIONS, cdiv
from ctxkern.runtime.triton.tiles import clip, splits, tile

from . import outer_kernels as kernels
from .call import TL_DTYPES
from .projections import together


def forward(call, projections):
    """y of each `Projection` into its rows."""
    for alike in together(projections):
        _forward(call, alike)


def _forward(call, alike):
    n, k = len(alike.members), call.context_dim
    t = tile("outer", *call.target, call.tokens, alike.widest, k)
    row_blocks = cdiv(call.tokens, t.rows)
    tiles = row_blocks * cdiv(alike.widest, t.columns)
    size = call.tokens * sum(alike.d_outs)
    parts = splits(call.d_in, tiles * n, 4 * size, call.budget)
    step = 16 * cdiv(call.d_in, 16 * parts)  # so that rows are read from multiples of 16 bytes on
    parts = cdiv(call.d_in, step)
    sums = call.buffer(parts * size, torch.float32) if parts > 1 else None
    call.launch(
        *(kernels._outer_forward_kernel, (tiles, parts, n)),
        *(call.x, call.context, call.slot, alike.weight, alike.bilinear, alike.bias, alike.rows, sums),
        *(alike.strides("bilinear"), alike.strides("weight")),
        *(alike.d_outs, call.tokens, call.d_in, k, step, row_blocks),
        BLOCK_M=t.rows,
        BLOCK_E=t.columns,
        BLOCK_K=t.depth,
        BLOCK_D=clip(step, 64),
        HAS_WEIGHT=alike.weight is not None,
        HAS_BIAS=alike.bias is not None,
        SLOTS=call.slot is not None,
        SPLIT=parts > 1,
        DTYPE=TL_DTYPES[call.dtype],
        PRECISION=call.precision,
        **t.launch(),
    )
    if parts > 1:
        block = 1024
        call.launch(
            *(kernels._outer_sum_kernel, (cdiv(call.tokens * alike.widest, block), n)),
            *(sums, alike.bias, alike.rows, alike.d_outs, call.tokens, parts),
            BLOCK=block,
            **OPTIONS,
            HAS_BIAS=alike.bias is not None,
        )


def backward(call, projections, dx, dcontext):
    """The gradients into tensors of theirs; None: not asked for."""
    projections = [p._replace(rows=p.rows.matrix()) for p in projections]
    batches = together(projections)
    for alike in batches:
        if alike.dweight is not None:
            for p in alike.members:
                _product(call, call.x.t(), p.rows, p.dweight, False)
        if alike.dbilinear is not None and call.context_dim:
            _spread(call, alike)
    if dx is not None or dcontext is not None:
        _turn(call, batches, dx, dcontext)


def _product(call, a, b, out, add):
    (m, k), n = a.shape, b.shape[1]
    t = tile("product", *call.target, m, n, k)
    call.launch(
        *(kernels._product_kernel, (cdiv(m, t.rows), cdiv(n, t.columns))),
        *(a, b, out),
        *(*a.strides, *b.strides, *out.strides),
        *(m, n, k),
        BLOCK_M=t.rows,
        BLOCK_N=t.columns,
        BLOCK_K=t.depth,
        ADD=add,
        DTYPE=TL_DTYPES[call.dtype],
        PRECISION=call.precision,
        **t.launch(),
    )


def _spread(call, alike):
    k = call.context_dim
    t = tile("outer-spread", *call.target, alike.widest, k, call.tokens)
    columns = cdiv(alike.widest, t.rows)
    call.launch(
        *(kernels._outer_spread_kernel, (call.d_in * columns, cdiv(k, t.columns), len(alike.members))),
        *(call.x, alike.rows, call.context, call.slot, alike.dbilinear),
        *(alike.strides("dbilinear"), alike.d_outs),
        *(call.tokens, call.d_in, k, columns),
        BLOCK_M=t.depth,
        BLOCK_E=t.rows,
        BLOCK_K=t.columns,
        SLOTS=call.slot is not None,
        PRECISION=call.wide_precision,
        **t.launch(),
    )


def _turn(call, batches, dx, dcontext):
    k = call.context_dim
    t = tile("outer-turn", *call.target, call.tokens, k, max(alike.widest for alike in batches))
    tiles = cdiv(call.tokens, t.rows)
    # without contexts dx is weight's part alone, which the kernel still writes
    pieces = [(alike, at) for alike in batches for at in range(0, max(k, 1), t.columns)]
    weighted = [] if dx is None else [p for alike in batches for p in alike.members if p.weight is not None]
    sums = None
    if weighted or dx is not None and len(pieces) > 1:
        sums = call.buffer((call.tokens, call.d_in), torch.float32)
    for at, p in enumerate(weighted):
        _product(call, p.rows, p.weight.t(), sums, at > 0)
    parts, partial = splits(call.d_in, tiles, 4 * call.tokens * k, call.budget), None
    step = 16 * cdiv(call.d_in, 16 * parts)
    parts = cdiv(call.d_in, step)
    if dcontext is not None:
        partial = call.buffer(parts * call.tokens * k, torch.float32)
    for piece, (alike, k_begin) in enumerate(pieces):
        call.launch(
            *(kernels._outer_turn_kernel, (tiles, parts)),
            *(call.x, alike.rows, call.context, call.slot, alike.bilinear, sums, dx, partial),
            *(alike.strides("bilinear"), alike.d_outs),
            *(call.tokens, call.d_in, k, k_begin, step),
            BLOCK_M=t.rows,
            BLOCK_E=t.depth,
            BLOCK_K=t.columns,
            DX=dx is not None,
            DCONTEXT=dcontext is not None,
            STARTED=bool(weighted) or piece > 0,
            LAST=piece + 1 == len(pieces),
            ADDED=alike is not batches[0],
            SLOTS=call.slot is not None,
            PRECISION=call.precision,
            **t.launch(),
        )
    if dcontext is not None and k:
        groups, block_k = call.groups, clip(k, 128)
        call.launch(
            *(kernels._outer_dcontext_kernel, (groups.limit, cdiv(k, block_k))),
            *(partial, groups.buffer, dcontext),
            *(*groups.arguments()[1:], call.tokens, k, parts),
            BLOCK_M=16,
            BLOCK_K=block_k,
            **OPTIONS,
            UNIFORM=groups.uniform,
            ORDERED=groups.ordered,
        )

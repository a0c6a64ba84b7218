"""Panel, launched: blocks of D × E, groups of contexts, and the kernels of each in their order (panel_kernels.py)."""

import torch

from ctxkern.runtime.triton.sizes import OPTIONS, cdiv
from ctxkern.runtime.triton.tiles import MAKE_ROWS, backward_blocks, clip, forward_blocks, make_tile, tile

from . import panel_backward_kernels as backward_kernels
from . import panel_kernels as kernels
from . import persistent
from .call import TL_DTYPES
from .projections import together

# of the budget: partial sums for dcontext
_PARTIAL_SHARE = 4


def forward(call, projections):
    """y of each `Projection` into its rows."""
    for alike in together(projections):
        if persistent.runs(call, alike.d_outs):
            persistent.forward(call, alike)
        else:
            _forward(call, alike)


def _forward(call, alike):
    limit = call.groups.limit
    blocks = forward_blocks(call.d_in, alike.d_outs, limit, call.dtype, call.budget)
    weights = call.buffer(call.d_in * blocks.width * blocks.strips * blocks.group)
    for first, strips in _blocks_of(alike.strips(blocks.width), blocks.strips):
        for u_begin, u_size in _blocks_of(limit, blocks.group):
            block = (0, call.d_in, blocks.width, u_begin, u_size, first, strips)
            _make(call, alike, weights, None, None, block, True)
            _project(call, alike, weights, block)


def _project(call, alike, weights, block):
    _, _, width, *rest, strips = block
    t = tile("project", *call.target, call.groups.block, width, call.d_in)
    call.launch(
        *(kernels._panel_project_kernel, (call.groups.tiles * strips * cdiv(width, t.columns),)),
        *(call.x, weights, alike.bias, call.groups.buffer, alike.rows),
        *(alike.d_outs, *call.groups.arguments()[1:], call.d_in, width, *rest, strips),
        BLOCK_N=t.columns,
        BLOCK_D=t.depth,
        HAS_BIAS=alike.bias is not None,
        **call.groups.flags(),
        PRECISION=call.precision,
        **t.launch(),
    )


def backward(call, projections, dx, dcontext):
    """The gradients into tensors of theirs; None: not asked for."""
    limit, k, batches = call.groups.limit, call.context_dim, together(projections)
    share = call.budget // _PARTIAL_SHARE if dcontext is not None else 0
    d_outs = max((alike.d_outs for alike in batches), key=sum)
    param_dtype = torch.promote_types(projections[0].bilinear.dtype, call.context.dtype)
    sizes = call.tokens, call.d_in, d_outs, k, limit
    blocks = backward_blocks(*sizes, call.dtype, param_dtype, call.budget - share)
    area = blocks.rows * blocks.width * blocks.strips
    held, products = call.buffer(area * blocks.group), call.buffer(area * blocks.group)
    sums = call.buffer(area * (k + 1), torch.float32) if blocks.group < limit else None
    rows, partial = MAKE_ROWS, None
    if dcontext is not None:
        t = make_tile(*call.target, blocks.width, blocks.group, k)[0]
        columns = blocks.strips * cdiv(blocks.width, t.rows)
        while rows < blocks.rows and 4 * limit * k * columns * cdiv(blocks.rows, rows) > share:
            rows *= 2
        programs = columns * cdiv(blocks.rows, rows)
        partial = call.buffer(programs * limit * k, torch.float32, zeroed=True)
    pieces = [(alike, *b) for alike in batches for b in _blocks_of(alike.strips(blocks.width), blocks.strips)]
    dx_sums = None
    if dx is not None and len(pieces) > 1:
        dx_sums = call.buffer(call.tokens * blocks.rows, torch.float32)
    for d_begin, d_size in _blocks_of(call.d_in, blocks.rows):
        for piece, (alike, first, strips) in enumerate(pieces):
            for u_begin, u_size in _blocks_of(limit, blocks.group):
                block = (d_begin, d_size, blocks.width, u_begin, u_size, first, strips)
                spread = alike.dweight is not None or alike.dbilinear is not None
                if spread or partial is not None:
                    _gather(call, alike, products, block)
                if dx is not None or partial is not None:
                    _make(call, alike, held, products, partial, block, dx is not None, rows)
                if spread:
                    _spread(call, alike, products, sums, block, u_begin > 0, u_begin + u_size >= limit)
                if dx is not None:
                    _turn(call, alike, held, dx_sums, dx, block, piece > 0, piece + 1 == len(pieces))
    if dcontext is not None and k:
        block_k = clip(k, 128)
        call.launch(
            *(backward_kernels._sum_partials_kernel, (limit, cdiv(k, block_k))),
            *(partial, call.groups.buffer, dcontext, limit, k, programs),
            BLOCK_P=32,
            BLOCK_K=block_k,
            UNIFORM=call.groups.uniform,
            **OPTIONS,
        )


def _make(call, alike, weights, products, partial, block, make, rows=MAKE_ROWS):
    """W of a block, and with `partial` its part of dcontext, in one pass over `bilinear` where K fits into a tile.

    rows: of D, a program.
    """
    *ranges, strips = block
    _, d_size, width, _, u_size, _ = ranges
    k = call.context_dim
    t, whole = make_tile(*call.target, width, u_size, k)
    sizes = (alike.d_outs, call.groups.limit, k, *ranges)
    programs = strips * cdiv(d_size, rows) * cdiv(width, t.rows)
    contexts = cdiv(u_size, t.columns)
    flags = {"ROWS": rows, "BLOCK_E": t.rows, "BLOCK_U": t.columns, "BLOCK_K": t.depth}
    flags |= {"UNIFORM": call.groups.uniform, "PRECISION": call.precision, **t.launch()}
    fused = partial is not None and whole
    if make or fused:
        call.launch(
            *(kernels._panel_make_kernel, (programs * contexts,)),
            *(alike.bilinear, alike.weight, call.context, call.groups.buffer, weights, products, partial),
            *(alike.strides("bilinear"), alike.strides("weight"), *sizes),
            WHOLE_K=whole,
            HAS_WEIGHT=alike.weight is not None,
            MAKE=make,
            DCONTEXT=fused,
            DTYPE=TL_DTYPES[call.dtype],
            **flags,
        )
    if partial is not None and not whole:
        call.launch(
            *(backward_kernels._panel_dcontext_kernel, (programs * contexts, cdiv(k, t.depth))),
            *(alike.bilinear, call.groups.buffer, products, partial, alike.strides("bilinear"), *sizes),
            **flags,
        )


def _blocks_of(size, step):
    return [(at, min(step, size - at)) for at in range(0, size, step)]


def _gather(call, alike, products, block):
    *ranges, strips = block
    _, d_size, width, _, u_size, _ = ranges
    t = tile("gather", *call.target, d_size, width, call.groups.block)
    grid = (strips * cdiv(d_size, t.rows) * cdiv(width, t.columns), u_size)
    call.launch(
        *(backward_kernels._panel_gather_kernel, grid),
        *(call.x, alike.rows, call.groups.buffer, products),
        *(alike.d_outs, *call.groups.arguments()[1:], call.d_in, *ranges),
        BLOCK_D=t.rows,
        BLOCK_E=t.columns,
        BLOCK_N=t.depth,
        UNIFORM=call.groups.uniform,
        ORDERED=call.groups.ordered,
        PRECISION=call.precision,
        **t.launch(),
    )


def _spread(call, alike, products, sums, block, started, last):
    *ranges, strips = block
    _, d_size, width, _, u_size, _ = ranges
    t = tile("spread", *call.target, width, call.context_dim, u_size)
    blocks_k = cdiv(call.context_dim, t.columns) if alike.dbilinear is not None else 1
    call.launch(
        *(backward_kernels._panel_spread_kernel, (strips * d_size * cdiv(width, t.rows), max(blocks_k, 1))),
        *(products, call.context, call.groups.buffer, alike.dbilinear, alike.dweight, sums),
        *(alike.strides("dbilinear"), alike.strides("dweight")),
        *(alike.d_outs, call.groups.limit, call.context_dim, *ranges),
        BLOCK_E=t.rows,
        BLOCK_U=t.depth,
        BLOCK_K=t.columns,
        DBILINEAR=alike.dbilinear is not None,
        DWEIGHT=alike.dweight is not None,
        STARTED=started,
        LAST=last,
        UNIFORM=call.groups.uniform,
        PRECISION=call.precision,
        **t.launch(),
    )


def _turn(call, alike, weights, sums, dx, block, started, last):
    t = tile("turn", *call.target, call.groups.block, block[1], block[2])
    call.launch(
        *(backward_kernels._panel_turn_kernel, (call.groups.tiles * cdiv(block[1], t.columns),)),
        *(alike.rows, weights, call.groups.buffer, sums, dx),
        *(alike.d_outs, *call.groups.arguments()[1:], call.d_in, *block),
        BLOCK_N=t.columns,
        BLOCK_E=t.depth,
        STARTED=started,
        LAST=last,
        **call.groups.flags(),
        PRECISION=call.precision,
        **t.launch(),
    )

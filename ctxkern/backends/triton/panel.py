"""Panel, launched: blocks of D × E, groups of contexts, and the kernels of each in their order (panel_kernels.py)."""

import torch
import triton

from . import panel_kernels as kernels
from .call import TL_DTYPES, contiguous, strides
from .tiles import MAKE_ROWS, backward_blocks, clip, forward_blocks, make_tile, tile

# of the budget: partial sums for dcontext
_PARTIAL_SHARE = 4


def forward(call, weights, bilinears, biases, outs):
    """y of each projection into `outs`."""
    for weight, bilinear, bias, out in zip(weights, bilinears, biases, outs, strict=True):
        if out.numel():
            _forward(call, weight, bilinear, contiguous(bias), out)


def _forward(call, weight, bilinear, bias, out):
    d_out, limit = bilinear.shape[1], call.groups.limit
    blocks = forward_blocks(call.d_in, d_out, limit, call.dtype, call.budget)
    weights = call.buffer(call.d_in * blocks.columns * blocks.group)
    for e_begin, e_size in _blocks_of(d_out, blocks.columns):
        for u_begin, u_size in _blocks_of(limit, blocks.group):
            block = (0, call.d_in, e_begin, e_size, u_begin, u_size)
            _make(call, weight, bilinear, weights, None, None, block, True)
            t = tile("project", *call.target, call.groups.block, e_size, call.d_in)
            kernels._panel_project_kernel[(call.groups.tiles, triton.cdiv(e_size, t.columns))](
                call.x,
                weights,
                bias,
                *(call.groups.buffer, out, *call.groups.arguments()[1:]),
                *(call.d_in, d_out, e_begin, e_size, u_begin, u_size),
                BLOCK_N=t.columns,
                BLOCK_D=t.depth,
                HAS_BIAS=bias is not None,
                **call.groups.flags(),
                PRECISION=call.precision,
                **t.launch(),
            )


def backward(call, douts, weights, bilinears, dx, dcontext, dweights, dbilinears):
    """The gradients into tensors of theirs; None: not asked for."""
    limit, k = call.groups.limit, call.context_dim
    widest = max(bilinears, key=lambda t: t.shape[1])
    param_dtype = torch.promote_types(widest.dtype, call.context.dtype)
    share = call.budget // _PARTIAL_SHARE if dcontext is not None else 0
    blocks = backward_blocks(call.d_in, widest.shape[1], k, limit, call.dtype, param_dtype, call.budget - share)
    area = blocks.rows * blocks.columns
    held, products = call.buffer(area * blocks.group), call.buffer(area * blocks.group)
    several = blocks.group < limit
    sums = call.buffer(area * (k + 1), torch.float32) if several else None
    columns = make_tile(*call.target, blocks.columns, blocks.group, k)[0].rows
    rows, partial = MAKE_ROWS, None
    if dcontext is not None:
        each = 4 * limit * k * triton.cdiv(blocks.columns, columns)
        while rows < blocks.rows and each * triton.cdiv(blocks.rows, rows) > share:
            rows *= 2
        programs = triton.cdiv(blocks.rows, rows) * triton.cdiv(blocks.columns, columns)
        partial = torch.zeros(programs * limit * k, dtype=torch.float32, device=call.x.device)
    pieces = [(i, *b) for i, t in enumerate(bilinears) for b in _blocks_of(t.shape[1], blocks.columns)]
    dx_sums = None
    if dx is not None and len(pieces) > 1:
        dx_sums = call.buffer(call.tokens * blocks.rows, torch.float32)
    for d_begin, d_size in _blocks_of(call.d_in, blocks.rows):
        for piece, (i, e_begin, e_size) in enumerate(pieces):
            for u_begin, u_size in _blocks_of(limit, blocks.group):
                block = (d_begin, d_size, e_begin, e_size, u_begin, u_size)
                grads = dweights[i], dbilinears[i]
                spread = any(g is not None for g in grads)
                if spread or partial is not None:
                    _gather(call, douts[i], products, block)
                if dx is not None or partial is not None:
                    _make(call, weights[i], bilinears[i], held, products, partial, block, dx is not None, rows)
                if spread:
                    _spread(call, products, *grads, sums, block, u_begin > 0, u_begin + u_size >= limit)
                if dx is not None:
                    _turn(call, douts[i], held, dx_sums, dx, block, piece > 0, piece + 1 == len(pieces))
    if dcontext is not None and k:
        block_k = clip(k, 128)
        kernels._sum_partials_kernel[(limit, triton.cdiv(k, block_k))](
            partial, call.groups.buffer, dcontext, limit, k, programs, BLOCK_K=block_k, UNIFORM=call.groups.uniform
        )


def _make(call, weight, bilinear, weights, products, partial, block, make, rows=MAKE_ROWS):
    """W of a block, and with `partial` its part of dcontext, in one pass over `bilinear` where K fits into a tile.

    rows: of D, a program.
    """
    d_begin, d_size, e_begin, e_size, u_begin, u_size = block
    k = call.context_dim
    t, whole = make_tile(*call.target, e_size, u_size, k)
    sizes = (call.groups.limit, k, *block)
    pairs = triton.cdiv(d_size, rows) * triton.cdiv(e_size, t.rows)
    contexts = triton.cdiv(u_size, t.columns)
    flags = {"ROWS": rows, "BLOCK_E": t.rows, "BLOCK_U": t.columns, "BLOCK_K": t.depth}
    flags |= {"UNIFORM": call.groups.uniform, "PRECISION": call.precision, **t.launch()}
    fused = partial is not None and whole
    if make or fused:
        kernels._panel_make_kernel[(pairs, contexts)](
            bilinear,
            weight,
            call.context,
            call.groups.buffer,
            weights,
            products,
            partial,
            *bilinear.stride(),
            *strides(weight, 2),
            *sizes,
            WHOLE_K=whole,
            HAS_WEIGHT=weight is not None,
            MAKE=make,
            DCONTEXT=fused,
            DTYPE=TL_DTYPES[call.dtype],
            **flags,
        )
    if partial is not None and not whole:
        kernels._panel_dcontext_kernel[(pairs, contexts, triton.cdiv(k, t.depth))](
            bilinear, call.groups.buffer, products, partial, *bilinear.stride(), *sizes, **flags
        )


def _blocks_of(size, step):
    return [(at, min(step, size - at)) for at in range(0, size, step)]


def _gather(call, dout, products, block):
    d_begin, d_size, e_begin, e_size, u_begin, u_size = block
    t = tile("gather", *call.target, d_size, e_size, call.groups.block)
    grid = (triton.cdiv(d_size, t.rows) * triton.cdiv(e_size, t.columns), u_size)
    kernels._panel_gather_kernel[grid](
        call.x,
        dout,
        *(call.groups.buffer, products, *call.groups.arguments()[1:]),
        *(call.d_in, dout.shape[-1], d_begin, d_size, e_begin, e_size, u_begin),
        BLOCK_D=t.rows,
        BLOCK_E=t.columns,
        BLOCK_N=t.depth,
        UNIFORM=call.groups.uniform,
        ORDERED=call.groups.ordered,
        PRECISION=call.precision,
        **t.launch(),
    )


def _spread(call, products, dweight, dbilinear, sums, block, started, last):
    d_begin, d_size, e_begin, e_size, u_begin, u_size = block
    t = tile("spread", *call.target, e_size, call.context_dim, u_size)
    blocks_k = triton.cdiv(call.context_dim, t.columns) if dbilinear is not None else 1
    kernels._panel_spread_kernel[(d_size * triton.cdiv(e_size, t.rows), max(blocks_k, 1))](
        products,
        call.context,
        call.groups.buffer,
        dbilinear,
        dweight,
        sums,
        *strides(dbilinear, 3),
        *strides(dweight, 2),
        *(call.groups.limit, call.context_dim, *block),
        BLOCK_E=t.rows,
        BLOCK_U=t.depth,
        BLOCK_K=t.columns,
        DBILINEAR=dbilinear is not None,
        DWEIGHT=dweight is not None,
        STARTED=started,
        LAST=last,
        UNIFORM=call.groups.uniform,
        PRECISION=call.precision,
        **t.launch(),
    )


def _turn(call, dout, weights, sums, dx, block, started, last):
    d_begin, d_size, e_begin, e_size, u_begin, u_size = block
    t = tile("turn", *call.target, call.groups.block, d_size, e_size)
    kernels._panel_turn_kernel[(call.groups.tiles, triton.cdiv(d_size, t.columns))](
        dout,
        weights,
        *(call.groups.buffer, sums, dx, *call.groups.arguments()[1:]),
        *(call.d_in, dout.shape[-1], *block),
        BLOCK_N=t.columns,
        BLOCK_E=t.depth,
        STARTED=started,
        LAST=last,
        **call.groups.flags(),
        PRECISION=call.precision,
        **t.launch(),
    )

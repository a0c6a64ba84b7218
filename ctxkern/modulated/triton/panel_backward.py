"""Panel backward: gradients of each context's weight, dx, and the order of it all; the maths is in panel.py."""

import torch
import triton.language as tl

from ctxkern.modulated.plan import by_library
from ctxkern.runtime.triton.device import kernel, whole
from ctxkern.runtime.triton.grouping import context_count, range_of, rows_at, tile_count, tile_range
from ctxkern.runtime.triton.sizes import cdiv
from ctxkern.runtime.triton.tiles import WEIGHT_ROWS, backward_blocks, tile, weights_tile

from .cost import library_pays
from .library import library_dx, library_g
from .panel import Block, cut
from .panel_parameters import panel_dbilinear, panel_dcontext_sum, takes_parameters, weights_and_dcontext
from .projections import pick, strip_at, together

# of the budget: partial sums for dcontext
_PARTIAL_SHARE = 4


@kernel
def _panel_g_kernel(
    # tensors
    x_ptr,  # [N, D]
    dys,  # of each projection [N, E]
    grads_ptr,  # [strips, U, D_BLOCK, width], out: G
    # sizes
    d_outs,
    d_in,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # block
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
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d_in = whole(d_in, UNIT=UNIT)
    d_size = whole(d_size, UNIT=UNIT)
    width = whole(width, UNIT=UNIT)
    u = tl.program_id(1)
    e_blocks = tl.cdiv(width, BLOCK_E)
    block = tl.program_id(0) // e_blocks
    d_blocks = tl.cdiv(d_size, BLOCK_D)
    slot = block // d_blocks
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if (u_begin + u >= context_count(groups_ptr, limit, UNIFORM)) | (e0 >= e_size):
        return
    begin, end = range_of(groups_ptr, limit, length, u_begin + u, UNIFORM)
    offs_d = (block % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_d = offs_d < d_size
    mask_e = offs_e < e_size
    dy_ptr = pick(part, dys)
    d_out = whole(pick(part, d_outs), UNIT=UNIT)
    # [BLOCK_D, BLOCK_E]
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
    tl.store(grads_ptr + cells, acc.to(grads_ptr.dtype.element_ty), mask=mask_d[:, None] & mask_e[None, :])


@kernel
def _panel_dx_kernel(
    # tensors
    dys,  # of each projection [N, E]
    panel_ptr,  # [strips, U, D_BLOCK, width]: W
    sums_ptr,  # [N, D_BLOCK], float32: the sums of several launches
    dx_ptr,  # [N, D]
    # sizes
    d_outs,
    d_in,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # block
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
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program sums over the columns of all strips of the launch, of all projections."""
    d_in = whole(d_in, UNIT=UNIT)
    d_size = whole(d_size, UNIT=UNIT)
    width = whole(width, UNIT=UNIT)
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
    mask = mask_m[:, None] & mask_n[None, :]
    sums = rows[:, None] * d_size + offs_n[None, :]
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STARTED:
        acc = tl.load(sums_ptr + sums, mask=mask, other=0.0)
    for slot in range(0, strips):
        part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
        dy_at = pick(part, dys) + rows[:, None] * whole(pick(part, d_outs), UNIT=UNIT) + (e_begin + offs_e)[None, :]
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
    if LAST:
        dx_at = dx_ptr + rows[:, None] * d_in + (d_begin + offs_n)[None, :]
        tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + sums, acc, mask=mask)


def backward_choice(call, d_outs, dcontext):
    """(blocks, bytes for parts of dcontext, whether the library makes G and dx)."""
    limit, k, share = call.most_contexts, call.context_dim, 0
    if dcontext:
        columns = cdiv(sum(d_outs), weights_tile(*call.target, max(d_outs), limit, k)[0].rows)
        share = min(call.budget // _PARTIAL_SHARE, 4 * limit * k * columns * cdiv(call.d_in, WEIGHT_ROWS))
    sizes = call.tokens, call.d_in, d_outs, k, limit, call.dtype, call.param_dtype, call.budget - share
    blocks = backward_blocks(*sizes, whole=call.uniform)
    problem = call.problem(d_outs[0])
    return blocks, share, by_library(call.uniform, lambda: library_pays(problem, d_outs, blocks, True, False))


def backward(call, projections, dx, dcontext):
    """The gradients into tensors of theirs; None: not asked for."""
    limit, k, batches = call.groups.limit, call.context_dim, together(projections)
    d_outs = max((alike.d_outs for alike in batches), key=sum)
    blocks, share, library = backward_choice(call, d_outs, dcontext is not None)
    area = blocks.rows * blocks.width * blocks.strips
    # W overwrites G
    panel = grads = call.buffer(area * blocks.group)
    sums = call.buffer(area * (k + 1), torch.float32) if blocks.group < limit else None
    rows, partial = WEIGHT_ROWS, None
    if dcontext is not None:
        t = weights_tile(*call.target, blocks.width, blocks.group, k)[0]
        columns = blocks.strips * cdiv(blocks.width, t.rows)
        while rows < blocks.rows and 4 * limit * k * columns * cdiv(blocks.rows, rows) > share:
            rows *= 2
        programs = columns * cdiv(blocks.rows, rows)
        partial = call.buffer(programs * limit * k, torch.float32, zeroed=True)
    pieces = [(alike, *piece) for alike in batches for piece in cut(alike.strips(blocks.width), blocks.strips)]
    dx_sums = None
    if dx is not None and len(pieces) > 1:
        dx_sums = call.buffer(call.tokens * blocks.rows, torch.float32)
    for d_begin, d_size in cut(call.d_in, blocks.rows):
        for piece, (alike, first, strips) in enumerate(pieces):
            for u_begin, u_size in cut(limit, blocks.group):
                block = Block(d_begin, d_size, blocks.width, u_begin, u_size, first, strips)
                parameters = alike.dweight is not None or alike.dbilinear is not None
                if parameters or partial is not None:
                    (library_g if library else _panel_g)(call, alike, grads, block)
                merged = parameters and takes_parameters(call, block, dx is not None or partial is not None)
                if parameters and not merged:
                    panel_dbilinear(call, alike, grads, sums, block, u_begin > 0, u_begin + u_size >= limit)
                if dx is not None or partial is not None:
                    made = panel if dx is not None else None
                    weights_and_dcontext(call, alike, made, grads, partial, block, rows, merged)
                if dx is not None and library and len(pieces) == 1:
                    library_dx(call, alike, panel, dx, block)
                elif dx is not None:
                    _panel_dx(call, alike, panel, dx_sums, dx, block, piece > 0, piece + 1 == len(pieces))
    if dcontext is not None and k:
        panel_dcontext_sum(call, partial, programs, dcontext)


def _panel_g(call, alike, grads, block):
    t = tile("panel_g", *call.target, block.d_size, block.width, call.groups.block)
    call.launch(
        _panel_g_kernel,
        grid=(block.strips * cdiv(block.d_size, t.rows) * cdiv(block.width, t.columns), block.u_size),
        x_ptr=call.x,
        dys=alike.rows,
        grads_ptr=grads,
        d_outs=alike.d_outs,
        d_in=call.d_in,
        **call.groups.arguments(),
        **block.sizes(),
        BLOCK_D=t.rows,
        BLOCK_E=t.columns,
        BLOCK_N=t.depth,
        UNIT=block.unit(call),
        PRECISION=call.precision,
        **t.launch(),
    )


def _panel_dx(call, alike, panel, sums, dx, block, started, last):
    t = tile("panel_dx", *call.target, call.groups.block, block.d_size, block.width)
    call.launch(
        _panel_dx_kernel,
        grid=(call.groups.tiles * cdiv(block.d_size, t.columns),),
        dys=alike.rows,
        panel_ptr=panel,
        sums_ptr=sums,
        dx_ptr=dx,
        d_outs=alike.d_outs,
        d_in=call.d_in,
        **call.groups.arguments(),
        **block.sizes(),
        strips=block.strips,
        BLOCK_M=call.groups.block,
        BLOCK_N=t.columns,
        BLOCK_E=t.depth,
        STARTED=started,
        LAST=last,
        UNIT=block.unit(call),
        PRECISION=call.precision,
        **t.launch(),
    )

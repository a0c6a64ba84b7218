"""Panel: weights of all contexts for a block of D × E, then their products with rows of x or dy; block after block.

  panel_weights    W_u[d, e] = weight[d, e] + Σ_k bilinear[d, e, k] c[u, k]   one pass over `bilinear` for all contexts
  panel_y          y[n, e] = Σ_d x[n, d] W_u[d, e] + bias[e]                  a tile: rows of one context

and backward (panel_backward.py, panel_parameters.py)

  panel_g          G_u[d, e] = Σ_{n of u} x[n, d] dy[n, e]
  panel_dx         dx[n, d] = Σ_e dy[n, e] W_u[d, e]
  panel_dbilinear  dbilinear[d, e, k] = Σ_u G_u[d, e] c[u, k]   dweight[d, e] = Σ_u G_u[d, e]
  panel_dcontext   dcontext[u, k] = Σ_{d, e} bilinear[d, e, k] G_u[d, e]

The last two are made by panel_weights where its tile holds all of K, and of dbilinear all contexts. dcontext is a part
per program, which panel_dcontext_sum adds up. The CUDA kernels have these names too (csrc/cuda/modulated/panel.h).

W and G live in a workspace, [strips of a launch, contexts of a group, rows of a block, width of a strip], in the dtype
of x: G first, then W in its place. Strips are columns of one or several projections (projections.py). Forward, a block
is all of D by some strips, so that no sum crosses blocks; backward, rows of D by all strips where they fit. No float
atomics. Where every context has as many rows, torch's library may take the place of panel_y, panel_g and panel_dx
(library.py).
"""

from typing import NamedTuple

import triton.language as tl

from ctxkern.modulated.plan import by_library
from ctxkern.runtime.triton.device import dot_rounded, dot_wide, kernel, whole, wide
from ctxkern.runtime.triton.grouping import context_count, rows_at, slots_of, tile_count, tile_range
from ctxkern.runtime.triton.sizes import cdiv
from ctxkern.runtime.triton.tiles import WEIGHT_ROWS, forward_blocks, tile, weights_tile

from .cost import library_pays
from .library import library_y
from .projections import pick, strip_at, together


@kernel
def _panel_weights_kernel(
    # tensors
    bilinears,  # of each projection [D, E, K]
    weights,  # [D, E] each
    context_ptr,  # [F, K]
    panel_ptr,  # [strips, U, D_BLOCK, width], out: W
    grads_ptr,  # likewise: G
    partial_ptr,  # [programs, U, K], added to: dcontext
    dbilinears,  # [D, E, K] each
    dweights,  # [D, E] each
    # strides
    strides_t,
    strides_w,
    strides_dt,
    strides_dw,
    # sizes
    d_outs,
    context_dim,
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
    ROWS: tl.constexpr,  # of D, per program
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,  # K fits into one block
    HAS_WEIGHT: tl.constexpr,
    WEIGHTS: tl.constexpr,  # whether W is asked for
    DCONTEXT: tl.constexpr,  # only with WHOLE_K
    DBILINEAR: tl.constexpr,  # likewise, and where BLOCK_U holds all contexts
    DWEIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    width = whole(width, UNIT=UNIT)
    # neighbours differ in their contexts: they read the same of `bilinear`
    contexts = tl.cdiv(u_size, BLOCK_U)
    program = tl.program_id(0) // contexts
    u0 = (tl.program_id(0) % contexts) * BLOCK_U
    e_blocks = tl.cdiv(width, BLOCK_E)
    blocks = e_blocks * tl.cdiv(d_size, ROWS)
    slot = program // blocks
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
    e0 = (program % e_blocks) * BLOCK_E
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    if (u0 >= count) | (e0 >= e_size):
        return
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
    first = (program % blocks // e_blocks) * ROWS
    for row in range(first, tl.minimum(first + ROWS, d_size)):
        d = wide(d_begin + row)
        t_at = bilinear_at + d * pick(part, strides_t[0])
        # [BLOCK_U, BLOCK_E]
        cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
        mask = mask_u[:, None] & mask_e[None, :]
        if WHOLE_K:
            t = tl.load(t_at, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        if DCONTEXT or DBILINEAR or DWEIGHT:
            g = tl.load(grads_ptr + cells, mask=mask, other=0.0)
        if DBILINEAR:
            # [BLOCK_E, BLOCK_K]
            gradient = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
            gradient = dot_wide(tl.trans(g), context, gradient, DTYPE=DTYPE, PRECISION=PRECISION)
            gradient_at = pick(part, dbilinears) + d * pick(part, strides_dt[0])
            gradient_at += columns[:, None] * pick(part, strides_dt[1]) + offs_k[None, :] * wide(
                pick(part, strides_dt[2])
            )
            tl.store(gradient_at, gradient.to(dbilinears[0].dtype.element_ty), mask=mask_e[:, None] & mask_k[None, :])
        if DWEIGHT:
            at = pick(part, dweights) + d * pick(part, strides_dw[0]) + columns * pick(part, strides_dw[1])
            tl.store(at, tl.sum(g.to(tl.float32), 0).to(dweights[0].dtype.element_ty), mask=mask_e)
        if DCONTEXT:
            # [BLOCK_U, BLOCK_K]
            dcontext = dot_wide(g, t, dcontext, DTYPE=DTYPE, PRECISION=PRECISION)
        if WEIGHTS:
            # [BLOCK_E, BLOCK_U]
            acc = tl.zeros([BLOCK_E, BLOCK_U], tl.float32)
            if WHOLE_K:
                acc = dot_rounded(t, tl.trans(context), acc, DTYPE=DTYPE, PRECISION=PRECISION)
            else:
                for k in range(0, context_dim, BLOCK_K):
                    mask_k = offs_k < context_dim - k
                    c = tl.load(context_at + k, mask=mask_u[:, None] & mask_k[None, :], other=0.0)
                    t = tl.load(t_at + k * stride_k, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
                    acc = dot_rounded(t, tl.trans(c), acc, DTYPE=DTYPE, PRECISION=PRECISION)
            if HAS_WEIGHT:
                w = tl.load(weight_at + d * pick(part, strides_w[0]), mask=mask_e, other=0.0)
                acc += w.to(tl.float32)[:, None]
            # W takes the place of G; a product of halves has all threads wait for G, which it reads in shared memory
            waited = (DCONTEXT or DBILINEAR) and DTYPE != tl.float32  # noqa: SIM300
            if (DCONTEXT or DBILINEAR or DWEIGHT) and not waited:
                tl.debug_barrier()
            tl.store(panel_ptr + cells, tl.trans(acc).to(panel_ptr.dtype.element_ty), mask=mask)
    if DCONTEXT:
        at = (program * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
        mask = mask_u[:, None] & mask_k[None, :]
        dcontext += tl.load(partial_ptr + at, mask=mask, other=0.0)
        tl.store(partial_ptr + at, dcontext, mask=mask)


@kernel
def _panel_y_kernel(
    # tensors
    x_ptr,  # [N, D]
    panel_ptr,  # [strips, U, D, width]: W
    biases,  # of each projection [E]
    outs,  # [N, E] each
    # sizes
    d_outs,
    d_in,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # block: all of D
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
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d_in = whole(d_in, UNIT=UNIT)
    width = whole(width, UNIT=UNIT)
    # programs of the same rows follow each other, so that x is read once
    blocks = tl.cdiv(width, BLOCK_N)
    column = tl.program_id(0) % (blocks * strips)
    slot = column // blocks
    n0 = (column % blocks) * BLOCK_N
    tile = tl.program_id(0) // (blocks * strips)
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
    if (tile >= tile_count(groups_ptr, tiles, UNIFORM)) | (n0 >= e_size):
        return
    u, begin, end = tile_range(groups_ptr, limit, length, tile, BLOCK_M, UNIFORM)
    if (u < u_begin) | (u >= u_begin + u_size):
        return
    grouped = begin + tl.arange(0, BLOCK_M)
    mask_m = grouped < end
    rows = rows_at(groups_ptr, limit, tiles, grouped, mask_m, ORDERED).to(tl.int64)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < e_size
    offs_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + rows[:, None] * d_in + offs_d[None, :]
    region = (slot * u_size + u - u_begin).to(tl.int64) * d_in
    w_at = panel_ptr + (region + offs_d[:, None]) * width + offs_n[None, :]
    # [BLOCK_M, BLOCK_N]
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
    y_at = pick(part, outs) + rows[:, None] * whole(pick(part, d_outs), UNIT=UNIT) + (e_begin + offs_n)[None, :]
    tl.store(y_at, acc.to(x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


class Block(NamedTuple):
    """What a launch covers: rows of D, strips of `width` columns, contexts."""

    d_begin: int
    d_size: int
    width: int
    u_begin: int
    u_size: int
    first_strip: int
    strips: int

    def sizes(self):
        """As kernels take them; `strips` is for those that need it."""
        return {name: value for name, value in self._asdict().items() if name != "strips"}

    def unit(self, call):
        """What divides all sizes of a launch, for kernels to know."""
        return 1 if self.d_begin % call.unit or self.d_size % call.unit or self.width % call.unit else call.unit


def cut(size, step):
    """[(first, number)] of its parts."""
    return [(at, min(step, size - at)) for at in range(0, size, step)]


def forward_choice(call, d_outs, biased):
    """(blocks, whether the library makes y)."""
    blocks = forward_blocks(call.d_in, d_outs, call.most_contexts, call.dtype, call.budget, call.tokens)
    problem = call.problem(d_outs[0])
    return blocks, by_library(call.uniform, lambda: library_pays(problem, d_outs, blocks, False, biased))


def forward(call, projections):
    """y of each `Projection` into its rows."""
    for alike in together(projections):
        _forward(call, alike)


def _forward(call, alike):
    limit = call.groups.limit
    blocks, library = forward_choice(call, alike.d_outs, alike.bias is not None)
    panel = call.buffer(call.d_in * blocks.width * blocks.strips * blocks.group)
    for first, strips in cut(alike.strips(blocks.width), blocks.strips):
        for u_begin, u_size in cut(limit, blocks.group):
            block = Block(0, call.d_in, blocks.width, u_begin, u_size, first, strips)
            panel_weights(call, alike, panel, block)
            (library_y if library else _panel_y)(call, alike, panel, block)


def panel_weights(call, alike, panel, block, grads=None, partial=None, rows=WEIGHT_ROWS, parameters=False):
    """W of a block into `panel` unless None; with `partial` its part of dcontext from G, where K fits into a tile.

    rows: of D, per program. parameters: dbilinear and dweight too.
    """
    t, all_of_k = weights_tile(*call.target, block.width, block.u_size, call.context_dim)
    programs = block.strips * cdiv(block.d_size, rows) * cdiv(block.width, t.rows)
    call.launch(
        _panel_weights_kernel,
        grid=(programs * cdiv(block.u_size, t.columns),),
        bilinears=alike.bilinear,
        weights=alike.weight,
        context_ptr=call.context,
        panel_ptr=panel,
        grads_ptr=grads,
        partial_ptr=partial,
        dbilinears=alike.dbilinear if parameters else None,
        dweights=alike.dweight if parameters else None,
        strides_t=alike.strides("bilinear"),
        strides_w=alike.strides("weight"),
        strides_dt=alike.strides("dbilinear") if parameters else None,
        strides_dw=alike.strides("dweight") if parameters else None,
        d_outs=alike.d_outs,
        context_dim=call.context_dim,
        **call.groups.arguments(),
        **block.sizes(),
        ROWS=rows,
        BLOCK_E=t.rows,
        BLOCK_U=t.columns,
        BLOCK_K=t.depth,
        WHOLE_K=all_of_k,
        HAS_WEIGHT=alike.weight is not None,
        WEIGHTS=panel is not None,
        DCONTEXT=partial is not None and all_of_k,
        DBILINEAR=parameters and alike.dbilinear is not None,
        DWEIGHT=parameters and alike.dweight is not None,
        UNIT=block.unit(call),
        **call.products,
        **t.launch(),
    )


def _panel_y(call, alike, panel, block):
    t = tile("panel_y", *call.target, call.groups.block, block.width, call.d_in)
    call.launch(
        _panel_y_kernel,
        grid=(call.groups.tiles * block.strips * cdiv(block.width, t.columns),),
        x_ptr=call.x,
        panel_ptr=panel,
        biases=alike.bias,
        outs=alike.rows,
        d_outs=alike.d_outs,
        d_in=call.d_in,
        **call.groups.arguments(),
        width=block.width,
        u_begin=block.u_begin,
        u_size=block.u_size,
        first_strip=block.first_strip,
        strips=block.strips,
        BLOCK_M=call.groups.block,
        BLOCK_N=t.columns,
        BLOCK_D=t.depth,
        HAS_BIAS=alike.bias is not None,
        UNIT=block.unit(call),
        PRECISION=call.precision,
        **t.launch(),
    )

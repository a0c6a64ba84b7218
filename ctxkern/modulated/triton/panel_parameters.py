"""Panel backward: gradients of `bilinear`, weight and context from those of each context's weight (panel.py)."""

import triton.language as tl

from ctxkern.runtime.triton.device import dot_wide, kernel, whole, wide
from ctxkern.runtime.triton.grouping import context_count, slots_of
from ctxkern.runtime.triton.sizes import OPTIONS, cdiv
from ctxkern.runtime.triton.tiles import FLOAT, HALF, clip, tile, weights_tile

from .panel import panel_weights
from .projections import pick, strip_at


@kernel
def _panel_dcontext_kernel(
    # tensors
    bilinears,  # of each projection [D, E, K]
    grads_ptr,  # [strips, U, D_BLOCK, width]
    partial_ptr,  # [programs, U, K], added to
    # strides
    strides_t,
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
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of `_panel_weights_kernel` that sums dcontext, for more of K than a program holds: a block of K each."""
    width = whole(width, UNIT=UNIT)
    contexts = tl.cdiv(u_size, BLOCK_U)
    program = tl.program_id(0) // contexts
    e_blocks = tl.cdiv(width, BLOCK_E)
    blocks = e_blocks * tl.cdiv(d_size, ROWS)
    slot = program // blocks
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
    u0 = (tl.program_id(0) % contexts) * BLOCK_U
    e0 = (program % e_blocks) * BLOCK_E
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    if (u0 >= count) | (e0 >= e_size):
        return
    offs_u = u0 + tl.arange(0, BLOCK_U)
    mask_u = offs_u < count
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    columns = (e_begin + offs_e).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    bilinear_at = pick(part, bilinears) + columns[:, None] * pick(part, strides_t[1])
    bilinear_at += offs_k[None, :] * wide(pick(part, strides_t[2]))
    # [BLOCK_U, BLOCK_K]
    acc = tl.zeros([BLOCK_U, BLOCK_K], tl.float32)
    first = (program % blocks // e_blocks) * ROWS
    for row in range(first, tl.minimum(first + ROWS, d_size)):
        d = (d_begin + row).to(tl.int64)
        t_at = bilinear_at + d * pick(part, strides_t[0])
        t = tl.load(t_at, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
        g = tl.load(grads_ptr + cells, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        acc = dot_wide(g, t, acc, DTYPE=DTYPE, PRECISION=PRECISION)
    at = (program * limit + u_begin + offs_u[:, None]).to(tl.int64) * context_dim + offs_k[None, :]
    mask = mask_u[:, None] & mask_k[None, :]
    acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(partial_ptr + at, acc, mask=mask)


@kernel
def _panel_dcontext_sum_kernel(
    # tensors
    partial_ptr,  # [programs, U, K], float32
    dcontext_ptr,  # [F, K]
    # sizes
    context_dim,
    programs,
    # groups
    groups_ptr,
    limit,
    tiles,
    length,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """dcontext of a context: its partial sums, in a fixed order."""
    u = tl.program_id(0)
    if u >= context_count(groups_ptr, limit, UNIFORM):
        return
    slot = slots_of(groups_ptr, u, True, UNIFORM)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row = p.to(tl.int64) * limit + u
        mask = (p < programs)[:, None] & mask_k[None, :]
        sums += tl.load(partial_ptr + row[:, None] * context_dim + offs_k[None, :], mask=mask, other=0.0)
    acc = tl.sum(sums, 0)
    at = dcontext_ptr + slot.to(tl.int64) * context_dim + offs_k
    tl.store(at, acc.to(dcontext_ptr.dtype.element_ty), mask=mask_k)


@kernel
def _panel_dbilinear_kernel(
    # tensors
    grads_ptr,  # [strips, U, D_BLOCK, width]: G
    context_ptr,  # [F, K]
    dbilinears,  # of each projection [D, E, K]
    dweights,  # [D, E] each
    sums_ptr,  # [strips, D_BLOCK, width, K + 1], float32: the sums of several groups
    # strides
    strides_t,
    strides_w,
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
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DBILINEAR: tl.constexpr,
    DWEIGHT: tl.constexpr,
    STARTED: tl.constexpr,  # sums hold earlier groups
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    width = whole(width, UNIT=UNIT)
    count = tl.minimum(context_count(groups_ptr, limit, UNIFORM) - u_begin, u_size)
    e_blocks = tl.cdiv(width, BLOCK_E)
    slot = tl.program_id(0) // (e_blocks * d_size)
    row = tl.program_id(0) // e_blocks % d_size
    part, e_begin, e_size = strip_at(first_strip + slot, d_outs, width, UNIT=UNIT)
    e0 = (tl.program_id(0) % e_blocks) * BLOCK_E
    if e0 >= e_size:
        return
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask_e = offs_e < e_size
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < context_dim
    # [BLOCK_E, BLOCK_K]
    acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    dweight = tl.zeros([BLOCK_E], tl.float32)
    for u0 in range(0, count, BLOCK_U):
        offs_u = u0 + tl.arange(0, BLOCK_U)
        mask_u = offs_u < count
        table = slots_of(groups_ptr, u_begin + offs_u, mask_u, UNIFORM).to(tl.int64)
        # [BLOCK_U, BLOCK_E]
        cells = ((slot * u_size + offs_u[:, None]).to(tl.int64) * d_size + row) * width + offs_e[None, :]
        g = tl.load(grads_ptr + cells, mask=mask_u[:, None] & mask_e[None, :], other=0.0)
        if DBILINEAR:
            c = tl.load(
                context_ptr + table[:, None] * context_dim + offs_k[None, :],
                mask=mask_u[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc = dot_wide(tl.trans(g), c, acc, DTYPE=DTYPE, PRECISION=PRECISION)
        if DWEIGHT:
            dweight += tl.sum(g.to(tl.float32), 0)
    d = (d_begin + row).to(tl.int64)
    columns = (e_begin + offs_e).to(tl.int64)
    sums = ((slot * d_size + row).to(tl.int64) * width + offs_e) * (context_dim + 1)
    if DBILINEAR:
        mask = mask_e[:, None] & mask_k[None, :]
        cells = sums[:, None] + offs_k[None, :]
        if STARTED:
            acc += tl.load(sums_ptr + cells, mask=mask, other=0.0)
        if LAST:
            gradient_at = pick(part, dbilinears) + d * pick(part, strides_t[0])
            gradient_at += columns[:, None] * pick(part, strides_t[1])
            gradient_at += offs_k[None, :] * wide(pick(part, strides_t[2]))
            tl.store(gradient_at, acc.to(dbilinears[0].dtype.element_ty), mask=mask)
        else:
            tl.store(sums_ptr + cells, acc, mask=mask)
    if DWEIGHT:
        if tl.program_id(1) == 0:
            if STARTED:
                dweight += tl.load(sums_ptr + sums + context_dim, mask=mask_e, other=0.0)
            if LAST:
                gradient = pick(part, dweights) + d * pick(part, strides_w[0]) + columns * pick(part, strides_w[1])
                tl.store(gradient, dweight.to(dweights[0].dtype.element_ty), mask=mask_e)
            else:
                tl.store(sums_ptr + sums + context_dim, dweight, mask=mask_e)


def takes_parameters(call, block, made):
    """Whether `weights_and_dcontext` makes dbilinear and dweight too, so that G is read once: a tile has all contexts
    and all of K, and registers suffice, as with parameters of the dtype of x. made: whether it runs at all."""
    t, all_of_k = weights_tile(*call.target, block.width, block.u_size, call.context_dim)
    all_contexts = block.u_size == call.groups.limit and block.u_size <= t.columns
    alike = call.target[0] in (HALF, FLOAT)
    return made and alike and all_of_k and all_contexts and call.context_dim > 0


def weights_and_dcontext(call, alike, panel, grads, partial, block, rows, parameters=False):
    """W unless `panel` is None, and dcontext unless `partial` is: in one launch where K fits into a tile. parameters:
    dbilinear and dweight in that launch too."""
    t, all_of_k = weights_tile(*call.target, block.width, block.u_size, call.context_dim)
    if partial is not None and not all_of_k:
        programs = block.strips * cdiv(block.d_size, rows) * cdiv(block.width, t.rows)
        call.launch(
            _panel_dcontext_kernel,
            grid=(programs * cdiv(block.u_size, t.columns), cdiv(call.context_dim, t.depth)),
            bilinears=alike.bilinear,
            grads_ptr=grads,
            partial_ptr=partial,
            strides_t=alike.strides("bilinear"),
            d_outs=alike.d_outs,
            context_dim=call.context_dim,
            **call.groups.arguments(),
            **block.sizes(),
            ROWS=rows,
            BLOCK_E=t.rows,
            BLOCK_U=t.columns,
            BLOCK_K=t.depth,
            UNIT=block.unit(call),
            **call.products,
            **t.launch(),
        )
    if panel is not None or all_of_k:
        panel_weights(call, alike, panel, block, grads, partial, rows, parameters)


def panel_dcontext_sum(call, partial, programs, dcontext):
    k = call.context_dim
    block_k = clip(k, 128)
    call.launch(
        _panel_dcontext_sum_kernel,
        grid=(call.groups.limit, cdiv(k, block_k)),
        partial_ptr=partial,
        dcontext_ptr=dcontext,
        context_dim=k,
        programs=programs,
        **call.groups.arguments(),
        BLOCK_P=32,
        BLOCK_K=block_k,
        **OPTIONS,
    )


def panel_dbilinear(call, alike, grads, sums, block, started, last):
    t = tile("panel_dbilinear", *call.target, block.width, call.context_dim, block.u_size)
    blocks_k = cdiv(call.context_dim, t.columns) if alike.dbilinear is not None else 1
    call.launch(
        _panel_dbilinear_kernel,
        grid=(block.strips * block.d_size * cdiv(block.width, t.rows), max(blocks_k, 1)),
        grads_ptr=grads,
        context_ptr=call.context,
        dbilinears=alike.dbilinear,
        dweights=alike.dweight,
        sums_ptr=sums,
        strides_t=alike.strides("dbilinear"),
        strides_w=alike.strides("dweight"),
        d_outs=alike.d_outs,
        context_dim=call.context_dim,
        **call.groups.arguments(),
        **block.sizes(),
        BLOCK_E=t.rows,
        BLOCK_U=t.depth,
        BLOCK_K=t.columns,
        DBILINEAR=alike.dbilinear is not None,
        DWEIGHT=alike.dweight is not None,
        STARTED=started,
        LAST=last,
        UNIT=block.unit(call),
        **call.products,
        **t.launch(),
    )

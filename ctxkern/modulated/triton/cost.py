"""What a call should take on an H100: for each launch the larger of its operations over the rate of products and of its
bytes over that of memory, and the launches themselves. W and G of a block that stays in cache count no bytes, nor do
rows that are read again while the cache holds them.
"""

from typing import NamedTuple

import torch

from ctxkern import plan as planner
from ctxkern.modulated.operands import rounds_to_tf32
from ctxkern.runtime.triton.sizes import cdiv, next_power_of_2
from ctxkern.runtime.triton.tiles import CACHED, PROGRAMS, splits

from .outer_backward import DX_ROWS
from .outer_parameters import DBILINEAR_ROWS

# of the rate of one large product: what our tiles should reach, and the library's. Seconds between launches of a graph;
# bytes of rows that stay in cache next to a block; seconds of a copy with two more under way; multiprocessors. None of
# them measured
_SHARE, _LIBRARY_SHARE = 0.6, 0.95
_LAUNCH = 2e-6
_CACHED = 24 << 20
_STEP = 0.25e-6
_PROGRAMS = 132
# FLOP/s of dtypes that were not measured, to weigh one form against the other
_TF32, _IEEE = 380e12, 50e12


class Launch(NamedTuple):
    """Launches alike: how many, operations, bytes, share of the rate of products, copies that wait for each other."""

    count: int
    flops: float
    moved: float
    share: float
    steps: float = 0


def predicted_seconds(problem, strategy, blocks, backward, library=False):
    """Seconds, or None where products of the dtype were not measured.

    blocks: `Blocks` of a panel; library: whether the library makes the products with rows.
    """
    p = problem
    if p.compute not in planner.H100.flops:
        return None
    launches = panel(p, (p.d_out,), blocks, backward, library) if strategy == "panel" else _outer(p, backward)
    return seconds(launches, p.dtype)


def library_pays(problem, d_outs, blocks, backward, biased):
    """Whether the library's products cost less than our kernels, of all projections of a call together."""
    own, library = (
        seconds(panel(problem, d_outs, blocks, backward, by_library, biased), problem.dtype)
        for by_library in (False, True)
    )
    return library < own


def seconds(launches, dtype):
    """Of all `launches`."""
    rates = planner.H100
    if dtype is torch.float32:
        rate = _TF32 if rounds_to_tf32(dtype) else _IEEE
    else:
        rate = rates.flops[torch.bfloat16]

    def of(launch):
        return max(launch.flops / (rate * launch.share), launch.moved / rates.bandwidth, launch.steps * _STEP)

    return sum(launch.count * (_LAUNCH + of(launch)) for launch in launches)


def panel(p, d_outs, blocks, backward, library, biased=False):
    """[Launch] of the panel form. biased: columns have biases, which the library needs another pass for."""
    rows, width, total = min(blocks.rows, p.d_in), min(blocks.width, max(d_outs)), sum(d_outs)
    columns = min(width * blocks.strips, total)
    group, groups = min(blocks.group, p.contexts), cdiv(p.contexts, blocks.group)
    down, across = cdiv(p.d_in, max(rows, 1)), cdiv(total, max(columns, 1))
    count, item = down * across * groups, p.dtype.itemsize
    tokens, each = p.tokens / groups, max(p.tokens // p.contexts, 1)
    cells = group * rows * columns * item
    cells = cells if cells > CACHED else 0
    x = _again(tokens * rows * item, across)
    y = _again(tokens * columns * item, down)
    bilinear = rows * columns * p.context_dim * p.param_dtype.itemsize
    made = 2 * group * rows * columns * p.context_dim
    flops = 2 * tokens * rows * columns
    # tiles of a product of `tall` rows of each context
    if library:
        parts, share, block, wide = blocks.strips, _LIBRARY_SHARE, 128, 256
    else:
        parts, share, block, wide = 1, _SHARE, min(128, max(16, next_power_of_2(each))), 128
    columns_each = columns / parts

    def product(tall, across, padded, x, y, w):
        tiles = group * cdiv(tall, block) * cdiv(int(across), wide)
        fill = tiles / (_PROGRAMS * cdiv(tiles, _PROGRAMS)) if tiles else 1.0
        return Launch(count * parts, flops / parts * padded, x + (y + w) / parts, share * fill)

    padded = cdiv(each, block) * block / each
    if not backward:
        found = [Launch(count, made, bilinear + cells, _SHARE), product(each, columns_each, padded, x, y, cells)]
        if library and biased:
            found.append(Launch(count * parts, 0, 2 * tokens * columns_each * item, 1.0))
        return found
    g = product(rows, columns_each, 1.0, x, y, cells)
    weights = Launch(count, 3 * made, 2 * bilinear + 2 * cells, _SHARE)
    dx = product(each, rows, padded, x, y, cells)
    if library and parts > 1:
        dx = dx._replace(moved=dx.moved + 2 * tokens * rows * item * (parts - 1) / parts)
    return [g, weights, dx]


def _again(moved, times):
    """Bytes a launch of what `times` launches read: from memory by the first of them alone where it stays in cache."""
    return moved if moved > _CACHED else moved / times


def _outer(p, backward):
    """[Launch] of the outer form, with tiles of 64 × 64 and two programs a multiprocessor."""
    size, item = p.d_in * p.d_out, p.param_dtype.itemsize
    rows = p.tokens * (p.d_in + p.d_out) * p.dtype.itemsize
    down, across, deep = cdiv(p.tokens, 64), cdiv(p.d_out, 64), cdiv(p.context_dim, 64)
    flops, bilinear = 2 * p.tokens * size * p.context_dim, size * p.context_dim * item
    product, weight = 2 * p.tokens * size * p.has_weight, size * item * p.has_weight

    def waves(programs):
        return cdiv(programs, 2 * _PROGRAMS)

    if not backward:
        parts = splits(p.d_in, down * across, 1, 1 << 30)
        steps = waves(parts * down * across) * cdiv(p.d_in, parts) * deep
        made = [Launch(1, flops + product, rows + bilinear + weight, _SHARE, steps)]
        return made + [Launch(1, 0, 0, 1.0)] * (parts > 1)
    each = max(1, min(DBILINEAR_ROWS, p.d_in * across * deep // (8 * PROGRAMS)))
    made = [
        Launch(1, flops, rows + bilinear, _SHARE, waves(cdiv(p.d_in, each) * across * deep) * (3 * down + each) / 3)
    ]
    parts = splits(p.d_in, down, 1, 1 << 30, DX_ROWS)
    steps = waves(parts * down) * cdiv(p.d_in, parts) * across * deep
    made.append(Launch(1, flops, rows + bilinear, _SHARE, steps))
    if p.has_weight:
        made += [Launch(1, product, rows + weight, _SHARE, steps) for steps in (down, across)]
    # not copied ahead
    return [*made, Launch(1, 0, 0, 1.0, 3 * cdiv(parts * p.tokens, 32 * max(p.contexts, 1)))]

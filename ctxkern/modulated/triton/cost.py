"""What a call should take on an H100: for each launch the larger of its operations over the rate of products and of its
bytes over that of memory, and the launches themselves. W and G of a block stay in cache and count no bytes, nor do rows
that are read again while the cache holds them.
"""

from ctxkern import plan as planner

# what these tiles should reach of the rate of one large product; seconds between launches of a graph; bytes of rows
# that stay in cache next to a block: none of them measured
_SHARE = 0.6
_LAUNCH = 2e-6
_CACHED = 24 << 20


def predicted_seconds(problem, strategy, blocks, backward):
    """Seconds, or None where products of the dtype were not measured.

    blocks: `Blocks` of a panel.
    """
    p, rates = problem, planner.H100
    if p.compute not in rates.flops:
        return None
    speed = rates.flops[p.compute] * _SHARE
    launches = (_panel if strategy == "panel" else _outer)(p, blocks, backward)
    return sum(count * (_LAUNCH + max(flops / speed, moved / rates.bandwidth)) for count, flops, moved in launches)


def _panel(p, blocks, backward):
    """[(count, operations, bytes)] of each kind of launch."""
    rows, columns = min(blocks.rows, p.d_in), min(blocks.width, p.d_out)
    groups = -(-p.contexts // blocks.group)
    down, across = -(-p.d_in // max(rows, 1)), -(-p.d_out // max(columns, 1))
    count = down * across * groups
    x = _again(p.tokens * rows * p.dtype.itemsize / groups, across)
    y = _again(p.tokens * columns * p.dtype.itemsize / groups, down)
    bilinear = rows * columns * p.context_dim * p.param_dtype.itemsize
    product = 2 * p.tokens * rows * columns / groups
    weights = 2 * min(blocks.group, p.contexts) * rows * columns * p.context_dim
    if not backward:
        return [(count, weights, bilinear), (count, product, x + y)]
    g = dx = (count, product, x + y)
    return [g, (count, 2 * weights, bilinear), (count, weights, bilinear), dx]


def _again(moved, times):
    """Bytes a launch of what `times` launches read: from memory by the first of them alone where it stays in cache."""
    return moved if moved > _CACHED else moved / times


def _outer(p, _blocks, backward):
    rows = p.tokens * (p.d_in + p.d_out) * p.dtype.itemsize
    bilinear = p.d_in * p.d_out * (p.context_dim + p.has_weight) * p.param_dtype.itemsize
    product = 2 * p.tokens * p.d_in * p.d_out * (p.context_dim + p.has_weight)
    return [(3 if backward else 1, product, rows + bilinear)]

"""Panel forward in one launch (persistent_kernel.py): how strips and tiles are cut."""

import torch

from ctxkern.runtime.triton.sizes import cdiv
from ctxkern.runtime.triton.tiles import MAKE_ROWS, forward_blocks, make_tile, programs, tile

from . import persistent_kernel as kernels
from .call import TL_DTYPES

# strips, at least, where there are columns enough: the first is made and the last projected while nothing else runs,
# but x is read once for each; 4 by the model of cost.py (with 8 it predicts 168 for 130 µs at E = 1024, K = 64), not
# measured
_STRIPS = 4


def blocks_of(call, d_outs):
    """The `Blocks` of projections, RING strips; fewer contexts than there are where the ring cannot hold all."""
    blocks = forward_blocks(call.d_in, d_outs, call.most_contexts, call.dtype, call.budget // kernels.RING)
    columns = tile("persistent", *call.target, call.rows_each, blocks.width, call.d_in).columns
    share = max(1, cdiv(sum(d_outs), _STRIPS))
    width = min(blocks.width, cdiv(share, columns) * columns)
    return blocks._replace(width=width, strips=kernels.RING)


def runs(call, d_outs):
    """Whether one launch is wanted and the ring holds all contexts."""
    return call.persistent and blocks_of(call, d_outs).group >= call.most_contexts


def forward(call, alike):
    """y of each `Projection` into its rows."""
    _, width, _, group = blocks_of(call, alike.d_outs)
    project = tile("persistent", *call.target, call.rows_each, width, call.d_in)
    make, whole = make_tile(*call.target, width, group, call.context_dim)
    make = make._replace(rows=min(make.rows, project.columns))
    strips = alike.strips(width)
    ring = call.buffer(kernels.RING * group * call.d_in * width)
    counters = call.buffer(1 + 2 * strips * cdiv(width, project.columns), torch.int32, zeroed=True)
    made = cdiv(call.d_in, MAKE_ROWS) * cdiv(width, make.rows) * cdiv(group, make.columns)
    each = made + call.groups.tiles * cdiv(width, project.columns)
    call.launch(
        *(kernels._panel_persistent_kernel, (min(programs(call.device), strips * each),)),
        *(call.x, call.context, alike.bilinear, alike.weight, alike.bias, alike.rows),
        *(call.groups.buffer, ring, counters, alike.strides("bilinear"), alike.strides("weight")),
        *(alike.d_outs, *call.groups.arguments()[1:], call.context_dim, call.d_in, width, strips),
        ROWS=MAKE_ROWS,
        BLOCK_E=make.rows,
        BLOCK_U=make.columns,
        BLOCK_K=make.depth,
        BLOCK_N=project.columns,
        BLOCK_D=project.depth,
        WHOLE_K=whole,
        HAS_WEIGHT=alike.weight is not None,
        HAS_BIAS=alike.bias is not None,
        **call.groups.flags(),
        DTYPE=TL_DTYPES[call.dtype],
        PRECISION=call.precision,
        RING=kernels.RING,
        **project.launch(),
    )

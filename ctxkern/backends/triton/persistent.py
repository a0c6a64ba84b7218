"""Panel forward in one launch (persistent_kernel.py): how strips and tiles are cut."""

import torch

from . import persistent_kernel as kernels
from .call import TL_DTYPES
from .sizes import cdiv
from .tiles import MAKE_ROWS, forward_blocks, make_tile, programs, tile

# strips, at least, where there are columns enough: what is made before the first and projected after the last
# product begins overlaps with nothing; not measured
_STRIPS = 8


def _tiles(call, alike):
    """(width of a strip, contexts of a group, tile of `make` and whether it holds all of K, tile of `project`)."""
    blocks = forward_blocks(call.d_in, alike.d_outs, call.groups.limit, call.dtype, call.budget // kernels.RING)
    project = tile("persistent", *call.target, call.groups.block, blocks.width, call.d_in)
    share = -(-sum(alike.d_outs) // _STRIPS)
    width = min(blocks.width, cdiv(share, project.columns) * project.columns)
    make, whole = make_tile(*call.target, width, blocks.group, call.context_dim)
    return width, blocks.group, make._replace(rows=min(make.rows, project.columns)), whole, project


def fits(call, alike):
    """Whether the ring holds all contexts."""
    return _tiles(call, alike)[1] >= call.groups.limit


def forward(call, alike):
    """y of each `Projection` into its rows."""
    width, group, make, whole, project = _tiles(call, alike)
    strips = alike.strips(width)
    ring = call.buffer(kernels.RING * group * call.d_in * width)
    counters = torch.zeros(1 + 2 * strips * cdiv(width, project.columns), dtype=torch.int32, device=ring.device)
    made = cdiv(call.d_in, MAKE_ROWS) * cdiv(width, make.rows) * cdiv(group, make.columns)
    each = made + call.groups.tiles * cdiv(width, project.columns)
    kernels._panel_persistent_kernel[(min(programs(call.x.device), strips * each),)](
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

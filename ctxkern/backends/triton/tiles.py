"""Tiles of the kernels and the blocks that a workspace holds: what a launch takes besides its operands."""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """rows × columns of a product's tile, its sum at a time, warps and copies in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def launch(self):
        return {"num_warps": self.warps, "num_stages": self.stages}


# by kernel and by dtypes: a half, a half beside float32 parameters, float32. Not measured yet: what fits into registers
# and shared memory of sm_80, sm_90 and sm_100 (bench/results/triton-audit.csv)
_HALF, _MIXED, _FLOAT = "half", "mixed", "float32"
_TILES = {
    ("project", _HALF): Tile(128, 128, 64, 8, 3),
    ("project", _FLOAT): Tile(64, 64, 32, 4, 3),
    ("turn", _HALF): Tile(128, 128, 64, 8, 3),
    ("turn", _FLOAT): Tile(64, 64, 32, 4, 3),
    ("gather", _HALF): Tile(128, 128, 64, 8, 3),
    ("gather", _FLOAT): Tile(64, 64, 32, 4, 3),
    # columns of E × contexts, K at a time
    ("make", _HALF): Tile(128, 64, 128, 4, 3),
    ("make", _MIXED): Tile(64, 64, 128, 4, 3),
    ("make", _FLOAT): Tile(32, 32, 32, 4, 2),
    # columns of E × K, contexts at a time
    ("spread", _HALF): Tile(128, 64, 64, 4, 2),
    ("spread", _FLOAT): Tile(64, 64, 32, 4, 2),
    # rows × columns of E, K at a time
    ("outer", _HALF): Tile(64, 64, 64, 4, 3),
    ("outer", _FLOAT): Tile(32, 32, 32, 4, 2),
    # rows × K, columns of E at a time
    ("outer-turn", _HALF): Tile(64, 64, 64, 4, 3),
    ("outer-turn", _FLOAT): Tile(32, 32, 32, 4, 2),
    # columns of E × K, rows at a time
    ("outer-spread", _HALF): Tile(64, 64, 64, 4, 2),
    ("outer-spread", _MIXED): Tile(64, 64, 32, 4, 2),
    ("outer-spread", _FLOAT): Tile(32, 32, 32, 4, 2),
    ("product", _HALF): Tile(64, 64, 64, 4, 3),
    ("product", _FLOAT): Tile(32, 32, 32, 4, 2),
}
# rows of D that a program of `make` goes through
MAKE_ROWS = 8


def clip(size, largest):
    """A power of two from 16 to `largest` that holds `size` if it can."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def kind_of(dtype, param_dtype):
    """Which of the tables dtypes fall under."""
    if dtype is torch.float32:
        return _FLOAT
    return _HALF if param_dtype is dtype else _MIXED


def tile(kernel, kind, rows, columns, depth):
    """The `Tile` of a kernel, cut to the sizes of a problem."""
    t = _TILES.get((kernel, kind)) or _TILES[kernel, _HALF]
    return t._replace(rows=clip(rows, t.rows), columns=clip(columns, t.columns), depth=clip(depth, t.depth))


# programs that keep a GPU busy: twice the multiprocessors of an H100
PROGRAMS = 264


def splits(size, programs, bytes_each, budget):
    """Into how many parts a sum over `size` is split so that there are programs enough, their sums within a budget."""
    wanted = min(-(-PROGRAMS // max(programs, 1)), -(-size // 16))
    return max(1, min(wanted, budget // max(bytes_each, 1)))


class Blocks(NamedTuple):
    """Rows of D and columns of E of a block, and contexts of a group."""

    rows: int
    columns: int
    group: int


def _down(size, to):
    """size cut to a multiple of `to` where it reaches one."""
    return size if size < to else size // to * to


# rows or columns of a block from which products run at the tile's speed; smaller ones cost loads twice over
_NARROW = 64


def forward_blocks(d_in, d_out, limit, dtype, budget):
    """All of D by as many columns as hold all contexts, or fewer contexts where those would be too few."""
    column = d_in * dtype.itemsize
    group = max(limit, 1)
    while group > 1 and column and budget // (column * group) < min(_NARROW, d_out):
        group = -(-group // 2)
    columns = _down(max(1, budget // max(column * group, 1)), _NARROW)
    return Blocks(d_in, min(columns, d_out), group)


def backward_blocks(d_in, d_out, context_dim, limit, dtype, param_dtype, budget):
    """As many rows of D as hold W and G of all contexts; where those are too few, less of E, then fewer contexts."""
    element = 2 * dtype.itemsize
    sums = (context_dim + 1) * torch.float32.itemsize
    columns, group = d_out, max(limit, 1)

    def rows():
        return budget // max(columns * (group * element + (sums if group < limit else 0)), 1)

    while rows() < min(_NARROW, d_in) and columns > _NARROW:
        columns = -(-columns // 2)
    while rows() < min(16, d_in) and group > 1:
        group = -(-group // 2)
    return Blocks(min(_down(max(1, rows()), _NARROW), d_in), max(columns, 1), group)

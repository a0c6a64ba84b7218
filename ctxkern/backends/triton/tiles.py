"""Tiles of the kernels and the blocks that a workspace holds: what a launch takes besides its operands."""

from functools import cache
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
HALF, MIXED, FLOAT = "half", "mixed", "float32"
_TILES = {
    ("project", HALF): Tile(128, 128, 64, 8, 3),
    ("project", FLOAT): Tile(64, 64, 32, 4, 3),
    ("turn", HALF): Tile(128, 128, 64, 8, 3),
    ("turn", FLOAT): Tile(64, 64, 16, 4, 3),
    ("gather", HALF): Tile(128, 128, 64, 8, 3),
    ("gather", FLOAT): Tile(64, 64, 32, 4, 3),
    # columns of E × contexts, K at a time
    ("make", HALF): Tile(128, 64, 128, 8, 3),
    ("make", MIXED): Tile(64, 64, 64, 8, 3),
    ("make", FLOAT): Tile(32, 16, 32, 4, 2),
    # K in several blocks
    ("make-long", HALF): Tile(64, 64, 64, 4, 3),
    ("make-long", MIXED): Tile(64, 32, 32, 4, 3),
    ("make-long", FLOAT): Tile(32, 16, 32, 4, 2),
    # columns of E × K, contexts at a time
    ("spread", HALF): Tile(128, 64, 64, 4, 2),
    ("spread", FLOAT): Tile(64, 64, 32, 4, 2),
    # rows × columns of E, K at a time
    ("outer", HALF): Tile(64, 64, 64, 4, 3),
    ("outer", FLOAT): Tile(32, 32, 32, 4, 2),
    # rows × K, columns of E at a time
    ("outer-turn", HALF): Tile(64, 64, 64, 4, 3),
    ("outer-turn", FLOAT): Tile(32, 32, 16, 4, 2),
    # columns of E × K, rows at a time
    ("outer-spread", HALF): Tile(64, 64, 64, 4, 2),
    ("outer-spread", MIXED): Tile(64, 64, 32, 4, 2),
    ("outer-spread", FLOAT): Tile(32, 32, 32, 4, 2),
    ("product", HALF): Tile(64, 64, 64, 4, 3),
    ("product", FLOAT): Tile(32, 32, 32, 4, 2),
}
# where rows do not begin at multiples of 16 bytes: operands pass through registers on their way
_UNALIGNED = {
    ("project", HALF): Tile(64, 64, 32, 4, 2),
    ("project", FLOAT): Tile(32, 64, 16, 4, 2),
    ("turn", HALF): Tile(64, 64, 32, 4, 2),
    ("turn", FLOAT): Tile(32, 64, 16, 4, 2),
    ("gather", HALF): Tile(64, 64, 32, 4, 2),
    ("gather", FLOAT): Tile(32, 64, 16, 4, 2),
    ("make", MIXED): Tile(64, 32, 64, 8, 2),
    ("spread", FLOAT): Tile(32, 64, 16, 4, 2),
}
# where an architecture has too few registers or too little shared memory for those
_ARCHITECTURES = {
    ("sm_80", "make", HALF): Tile(64, 32, 128, 8, 3),
    ("sm_80", "make", MIXED): Tile(32, 32, 64, 4, 2),
    ("sm_80", "turn", HALF): Tile(128, 64, 32, 4, 3),
    ("sm_80", "spread", MIXED): Tile(64, 64, 32, 4, 2),
    ("sm_80", "outer-turn", MIXED): Tile(32, 32, 32, 4, 2),
    ("sm_100", "make", MIXED): Tile(64, 32, 64, 4, 3),
    ("sm_100", "turn", HALF): Tile(128, 128, 32, 8, 3),
    ("sm_100", "spread", HALF): Tile(64, 64, 64, 4, 2),
    ("sm_100", "outer-turn", MIXED): Tile(32, 32, 32, 4, 2),
    ("gfx942", "make", HALF): Tile(64, 32, 128, 4, 2),
    ("gfx942", "make", MIXED): Tile(32, 32, 64, 4, 2),
}
# rows of D that a program of `make` goes through
MAKE_ROWS = 8


def make_tile(kind, arch, aligned, columns, contexts, context_dim):
    """The `Tile` of `make`, and whether it holds all of K."""
    t = tile("make", kind, arch, aligned, columns, contexts, context_dim)
    if context_dim <= t.depth:
        return t, True
    return tile("make-long", kind, arch, aligned, columns, contexts, context_dim), False


def clip(size, largest):
    """A power of two from 16 to `largest` that holds `size` if it can."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def kind_of(dtype, param_dtype):
    """Which of the tables dtypes fall under."""
    if dtype is torch.float32:
        return FLOAT
    return HALF if param_dtype is dtype else MIXED


@cache
def architecture(device):
    """sm_90 and so on, gfx942 and so on; sm_90 where there is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tile(kernel, kind, arch, aligned, rows, columns, depth):
    """The `Tile` of a kernel, cut to the sizes of a problem. aligned: whether rows begin at multiples of 16 bytes."""
    kinds = (kind, HALF) if kind == MIXED else (kind,)
    found = [_ARCHITECTURES.get((arch, kernel, k)) for k in kinds] if aligned or kernel == "make" else []
    found += [] if aligned else [_UNALIGNED.get((kernel, k)) for k in kinds]
    found += [_TILES.get((kernel, k)) for k in kinds]
    t = next(t for t in found if t)
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


# programs in the second direction of a launch, at most: contexts of a group
_GRID = 65_535
# rows or columns of a block from which products run at the tile's speed; smaller ones cost loads twice over
_NARROW = 64


def forward_blocks(d_in, d_out, limit, dtype, budget):
    """All of D by as many columns as hold all contexts, or fewer contexts where those would be too few."""
    column = d_in * dtype.itemsize
    group = min(max(limit, 1), _GRID)
    while group > 1 and column and budget // (column * group) < min(_NARROW, d_out):
        group = -(-group // 2)
    columns = _down(max(1, budget // max(column * group, 1)), _NARROW)
    return Blocks(d_in, min(columns, d_out), group)


def backward_blocks(d_in, d_out, context_dim, limit, dtype, param_dtype, budget):
    """As many rows of D as hold W and G of all contexts; where those are too few, less of E, then fewer contexts."""
    element = 2 * dtype.itemsize
    sums = (context_dim + 1) * torch.float32.itemsize
    columns, group = d_out, min(max(limit, 1), _GRID)

    def rows():
        return budget // max(columns * (group * element + (sums if group < limit else 0)), 1)

    while rows() < min(_NARROW, d_in) and columns > _NARROW:
        columns = -(-columns // 2)
    while rows() < min(16, d_in) and group > 1:
        group = -(-group // 2)
    return Blocks(min(_down(max(1, rows()), _NARROW), d_in), max(columns, 1), group)

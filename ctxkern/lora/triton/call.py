"""What all launches of a low-rank update share: rows as a matrix, adapters, groups of rows, products."""

from typing import NamedTuple

import torch

from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.grouping import group_rows
from ctxkern.runtime.triton.launches import Operand
from ctxkern.runtime.triton.products import TL_DTYPES, products
from ctxkern.runtime.triton.sizes import cdiv

from .update import check_ranks

# ranks that a program holds, of products of halves and of float32; of more, one launch after another
_MOST_RANKS, _MOST_RANKS_FLOAT32 = 256, 64
# those beyond have tiles of their own
FEW_RANKS = 64


class Update(NamedTuple):
    """The update of rows of x, of tensors or `Operand`s."""

    x: Operand  # [B, S, D] or [N, D]
    A: Operand  # [b, R, D]
    B: Operand  # [b, E, R]
    scales: Operand | None = None  # [b] float32
    ranks: Operand | None = None  # [b] int64
    seed: Operand | None = None  # [] int64, of dropout
    gate: Operand | None = None  # [G, R] float32: what x Aᵀ is multiplied by
    gate_index: Operand | None = None  # [N] int64: its row for each row of x; None: the same
    index: Operand | None = None  # [B] int64, −1: no adapter
    bounds: Operand | None = None  # [B + 1]


class Numbers(NamedTuple):
    """scale: of the update, what dropout scales up included. kept_from: draws of 32 bits from here on are kept."""

    scale: float
    kept_from: int = 0


class Ranks(NamedTuple):
    """Those of a launch: the first, and what the name of a tile ends in."""

    first: int
    block: int
    suffix: str


class Call:
    """operands: an `Update` of `Operand`s. name: of the kernel whose tile says how many rows a group's tile has.

    Tiles depend on widths, ranks and dtypes alone: what else is in the batch changes no bit of an adapter's rows.
    """

    def __init__(self, operands, numbers, name, device, layout):
        x, A, B = operands[:3]
        self.operands, self.numbers, self.layout = operands, numbers, layout
        self.x = x.matrix()
        self.tokens, self.d_in = self.x.shape
        self.table, self.rank, _ = A.shape
        self.d_out = B.shape[1]
        kind = tiles.kind_of(x.dtype, A.dtype is not x.dtype or B.dtype is not x.dtype)
        aligned = all(size % 16 == 0 for size in (self.d_in, self.d_out, self.rank))
        self.target = kind, tiles.architecture(device), aligned
        self.compute, self.precision = products(x.dtype, *self.target[:2])
        # what lies between two products, scaled into its range
        self.scaled = self.compute is torch.float16
        self.between = torch.float32 if self.scaled else self.compute
        sequences, length = x.shape[:2] if operands.bounds is None else (operands.bounds.shape[0] - 1, 0)
        sizes = self.tokens, sequences, length, self.table
        self.block = min(self.tile(name, ranks).rows for ranks in self.ranks())
        if operands.ranks is not None:
            check_ranks(layout, operands.ranks, self.table, self.rank)
        self.groups = group_rows(layout, sizes, operands.index, operands.bounds, self.block, -1)

    def ranks(self):
        """The `Ranks` of each launch."""
        most = _MOST_RANKS_FLOAT32 if self.compute is torch.float32 else _MOST_RANKS
        for first in range(0, self.rank, most):
            size = min(most, self.rank - first)
            yield Ranks(first, tiles.clip(size, most), "" if size <= FEW_RANKS else "_high")

    def tile(self, name, ranks, columns=1 << 16, depth=1 << 16):
        return tiles.tile(name + ranks.suffix, *self.target, 1 << 16, columns, depth)

    def parts(self, size, block):
        """(columns of each, number) of the parts that programs of the same rows take, where those would be few."""
        parts = min(cdiv(tiles.PROGRAMS, self.groups.tiles), cdiv(size, block))
        step = block * cdiv(cdiv(size, block), parts)
        return step, cdiv(size, step)

    def buffer(self, size, dtype):
        return self.layout.buffer(size, dtype)

    def launch(self, kernel, grid, ranks, **arguments):
        """Adds a launch, with what all kernels take."""
        o = self.operands
        shared = {
            "x_ptr": self.x,
            "a_ptr": o.A,
            "b_ptr": o.B,
            "scales_ptr": o.scales,
            "ranks_ptr": o.ranks,
            "seed_ptr": o.seed,
            "gate_ptr": o.gate,
            "gate_index_ptr": o.gate_index,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "rank": self.rank,
            "r_begin": ranks.first,
            "scale": self.numbers.scale,
            "kept_from": self.numbers.kept_from,
            "BLOCK_R": ranks.block,
            "DROPOUT": o.seed is not None,
            "SCALED": self.scaled,
            "DTYPE": TL_DTYPES[self.compute],
            "PRECISION": self.precision,
            **_strides("a", o.A),
            **_strides("b", o.B),
            **self.groups.arguments(),
        }
        taken = {name: value for name, value in shared.items() if name in kernel.arg_names}
        self.layout.launch(kernel, grid, taken | arguments)


def _strides(name, t):
    return {f"stride_{name}_{i}": stride for i, stride in enumerate(t.strides)}


def strides_of(name, t):
    """Those of a gradient, None of None."""
    return _strides(name, t) if t is not None else {f"stride_{name}_{i}": None for i in range(3)}

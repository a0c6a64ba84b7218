"""What a low-rank call is given and gives back, and what backends do alike around their kernels.

A backend is a module of this folder with

    forward(operands, options) → y                      dtype and leading shape of x
    backward(dout, operands, options, needs) → Gradients

both with `gates` as a last argument that may be left out.

All tensors that reach it are plain (`ctxkern.ops`).
"""

from typing import Any, NamedTuple

import torch

from ctxkern.checks import check_bounds, check_index, check_ranks, is_readable

from .base import base_gradients, base_product


class Options(NamedTuple):
    """Of a call, what is no tensor. dropout: the share of x that A does not see."""

    workspace_bytes: int
    backend: str | None
    scale: float
    dropout: float


class Operands(NamedTuple):
    """x [B, S, D] or packed [N, D]; weight [E, D] or None; A [b, r, D]; B [b, E, r]; bias [E] or None."""

    x: torch.Tensor
    weight: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None  # [b] float32, in addition to the number
    ranks: torch.Tensor | None = None  # [b] int64
    seed: torch.Tensor | None = None  # [] int64, of dropout
    adapter_index: torch.Tensor | None = None  # [B] int64, −1: none
    cu_seqlens: torch.Tensor | None = None  # [B + 1]

    def flat(self):
        return tuple(self)

    @classmethod
    def of(cls, flat):
        return cls(*flat)


# scales and what follows
CONSTANTS = 5


class Gates(NamedTuple):
    """Factors of the entries of x A^T, a row of them for each row of x (`ctxkern.factored`)."""

    values: torch.Tensor  # [G, R] float32, without gaps
    rows: torch.Tensor | None  # [N] int64 row of `values` of each row of x; None: as many, in order
    products: torch.Tensor | None = None  # [N, R] float32 for the gradient of each row's gates, which a backward writes
    # in the C++ kernels of the CPU alone: how many rows of x each of `rows` is for, or [B + 1] int32 where they begin
    length: int = 1
    bounds: torch.Tensor | None = None


class Gradients(NamedTuple):
    """One entry per operand that has a gradient. As `needs`: whether it is asked for. Absent ones are None."""

    x: Any
    weight: Any
    A: Any
    B: Any
    bias: Any

    @classmethod
    def of(cls, flat):
        return cls(*flat)

    def flat(self):
        return tuple(self)


def _contiguous(t):
    return t if t is None or t.is_contiguous() else t.contiguous()


def without_gaps(operands):
    """The same with what kernels read row by row made contiguous; weight, A and B stay as they lie."""
    x, weight, A, B, bias, *constants = operands
    for t in (x, *constants):
        if t is not None and not t.is_contiguous():
            return Operands(_contiguous(x), weight, A, B, bias, *map(_contiguous, constants))
    return operands


def check_values(operands):
    """Of integer tensors on the CPU; on a GPU the kernels check them."""
    x, A, ranks, index, bounds = operands.x, operands.A, operands.ranks, operands.adapter_index, operands.cu_seqlens
    if index is not None and is_readable(index):
        check_index(index, len(A), "adapter_index", -1)
    if bounds is not None and is_readable(bounds):
        check_bounds(bounds, len(x))
    if ranks is not None and is_readable(ranks):
        check_ranks(ranks, A.shape[1])


def new_output(operands, workspace_bytes, own=None):
    """(y [N, E], whether the update is added to it or written over it) of operands without gaps; own: as in `base`."""
    x, weight, _, B, bias = operands[:5]
    flat = x.flatten(0, -2)
    if weight is not None:
        return base_product(flat, weight, bias, workspace_bytes, own), True
    if bias is not None:
        return bias.to(x.dtype).expand(len(flat), -1).contiguous(), True
    if operands.adapter_index is not None:
        return x.new_zeros(len(flat), B.shape[1]), True
    return x.new_empty(len(flat), B.shape[1]), False


def new_gradients(dy, operands, needs, workspace_bytes, own=None):
    """(dx [N, D], whether the update is added to it, dweight, dbias) likewise, for dy [N, E]; None: not asked for."""
    x, weight, _, _, bias = operands[:5]
    flat = x.flatten(0, -2)
    dx, dweight, dbias = base_gradients(flat, dy, weight, bias, needs, workspace_bytes, own)
    adds = dx is not None
    if needs.x and not adds:
        adds = operands.adapter_index is not None
        dx = flat.new_zeros(flat.shape) if adds else flat.new_empty(flat.shape)
    return dx, adds, dweight, dbias

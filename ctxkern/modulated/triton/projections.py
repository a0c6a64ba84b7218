"""Several projections of the same rows in one launch: operands in tuples, columns of all of them in strips.

A strip is `width` columns of one projection, or what is left there; strips are numbered through, projection after
projection. So Q, K and V are made, projected and summed by the launches of one, and dx is one sum over all three.
"""

from itertools import groupby
from typing import NamedTuple

import triton
import triton.language as tl

from ctxkern.runtime.triton.device import whole
from ctxkern.runtime.triton.launches import Operand, Operands


class Projection(NamedTuple):
    """weight [D, E], bilinear [D, E, K], bias [E]; rows: y or dy [N, E]; gradients of the first two, if asked for."""

    weight: Operand | None
    bilinear: Operand
    bias: Operand | None
    rows: Operand
    dweight: Operand | None = None
    dbilinear: Operand | None = None


class Projections:
    """What one launch takes: dtypes and absences are the same in all of `members`."""

    def __init__(self, members):
        self.members = members
        self.d_outs = tuple(p.bilinear.shape[1] for p in members)
        self.widest = max(self.d_outs)

    def __getattr__(self, name):
        """The operands of that name in a tuple; None where there are none."""
        found = Operands(getattr(p, name) for p in self.members)
        return None if found[0] is None else found

    def strides(self, name):
        """((of the first dimension of each), (of the second), …)."""
        found = getattr(self, name)
        return None if found is None else tuple(zip(*(t.strides for t in found), strict=True))

    def strips(self, width):
        return sum(-(-d_out // width) for d_out in self.d_outs)


def together(members):
    """The `Projections` to launch; what has no columns is left out."""
    members = [p for p in members if p.bilinear.shape[1]]
    return [Projections(list(alike)) for _, alike in groupby(members, _kinds)]


def _kinds(projection):
    return tuple(None if t is None else t.dtype for t in projection)


@triton.jit
def pick(part, values):
    """values[part] of a tuple."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(part == i, values[i], value)
    return value


@triton.jit
def strip_at(strip, d_outs, width, UNIT: tl.constexpr):
    """Projection of a strip, its first column there, and how many it has. UNIT divides `width` and all of `d_outs`."""
    part = 0
    before = 0
    end = 0
    for i in tl.static_range(0, len(d_outs) - 1):
        end += tl.cdiv(d_outs[i], width)
        part += tl.where(strip >= end, 1, 0)
        before = tl.where(strip >= end, end, before)
    begin = (strip - before) * width
    return part, begin, tl.minimum(width, whole(pick(part, d_outs), UNIT=UNIT) - begin)


@triton.jit
def columns_before(part, d_outs):
    """Columns of the projections before one."""
    before = 0
    for i in tl.static_range(0, len(d_outs) - 1):
        before += tl.where(part > i, d_outs[i], 0)
    return before

"""The dtypes that ctxkern computes with. Every other list or table of dtypes derives from `TABLE`.

A row is all that a new dtype needs here; the kernels that take it need code for it.
"""

from typing import NamedTuple

import torch


class Row(NamedTuple):
    dtype: torch.dtype
    short: str
    code: int | None  # enum Dtype of csrc/problem.h; None: no compiled or Triton kernel takes it


TABLE = (
    Row(torch.float32, "f32", 0),
    Row(torch.bfloat16, "bf16", 1),
    Row(torch.float16, "f16", 2),
    Row(torch.float64, "f64", None),
)

FLOATS = tuple(row.dtype for row in TABLE)
CODES = {row.dtype: row.code for row in TABLE if row.code is not None}
KERNEL_FLOATS = tuple(CODES)
SHORT = {row.dtype: row.short for row in TABLE}
HALVES = tuple(dtype for dtype in FLOATS if dtype.itemsize == 2)


def name_of(dtype):
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


NAMES = tuple(name_of(dtype) for dtype in FLOATS)


def by_name(name):
    """torch.float32 for "float32". Raises ValueError for a name that is not in the table."""
    if name not in NAMES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(NAMES)}")
    return getattr(torch, name)


def accumulator(dtype):
    """The dtype in which sums over values of `dtype` are kept: float32 or wider."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def mixes(param_dtype, dtype):
    """Whether kernels read parameters of `param_dtype` as they are next to activations of `dtype`: the same dtype, or a
    half and float32 in either place."""
    if param_dtype is dtype:
        return True
    return torch.float32 in (param_dtype, dtype) and (param_dtype in HALVES or dtype in HALVES)

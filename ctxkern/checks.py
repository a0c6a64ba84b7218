"""Checks of what callers pass. Every error names the function, the argument, what it got and what it takes."""

import torch

from .dtypes import FLOATS, name_of
from .plan import DEFAULT_WORKSPACE


def _names(dtypes):
    return " or ".join(name_of(d) for d in dtypes)


def tensor(op, name, t, ndims, takes):
    """`t` is a strided tensor of one of the numbers of dimensions `ndims`; `takes` is its shape in words."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}, takes a tensor {takes}")
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(
            f"{op}: {name} is a {'nested' if t.is_nested else t.layout} tensor, takes a strided one {takes}"
        )
    if t.dim() not in ndims:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, takes {takes}")


def activation(op, name, t):
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {_names([t.dtype])}, takes {_names(FLOATS)}")


def parameter(op, name, t, x):
    """A parameter beside the activations x: same device, dtype that of x or float32 beside a half."""
    dtype = t.dtype
    if dtype is not x.dtype and not (dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"{op}: {name} is {_names([dtype])} beside x in {_names([x.dtype])}, takes {_beside(x)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, takes the device of x, {x.device}")


def _beside(x):
    return _names([x.dtype] if x.dtype in (torch.float32, torch.float64) else [x.dtype, torch.float32])


def shape(op, name, t, expected, takes):
    if t.shape != expected:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, takes {takes} = {list(expected)}")


def bias(op, name, t, x, d_out):
    if t is not None:
        tensor(op, name, t, (1,), "[E]")
        parameter(op, name, t, x)
        shape(op, name, t, (d_out,), "[E]")


def sequences(op, x, table, table_name, index, index_name, cu_seqlens):
    """The number of sequences agrees between x, the context (or adapter) table, its index and cu_seqlens."""
    if cu_seqlens is None:
        if x.dim() == 2:
            raise ValueError(
                f"{op}: x has shape {list(x.shape)}, packed [N, D], takes cu_seqlens beside it, or [B, S, D]"
            )
        batch = x.shape[0]
    else:
        tensor(op, "cu_seqlens", cu_seqlens, (1,), "[B + 1]")
        _integers(op, "cu_seqlens", cu_seqlens, torch.int32, x)
        if x.dim() == 3:
            raise ValueError(f"{op}: x has shape {list(x.shape)}, takes packed [N, D] beside cu_seqlens")
        batch = cu_seqlens.shape[0] - 1
        if batch < 0:
            raise ValueError(f"{op}: cu_seqlens has shape [0], takes [B + 1], from 0 to N")
    if index is not None:
        tensor(op, index_name, index, (1,), "[B]")
        _integers(op, index_name, index, torch.int64, x)
        shape(op, index_name, index, (batch,), "[B]")
    elif table.shape[0] != batch:
        raise ValueError(
            f"{op}: {table_name} has {table.shape[0]} rows for {batch} sequences, takes one each, or {index_name} [B]"
        )


def _integers(op, name, t, dtype, x):
    if t.dtype is not dtype:
        raise TypeError(f"{op}: {name} is {_names([t.dtype])}, takes {_names([dtype])}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, takes the device of x, {x.device}")


def workspace(op, value):
    """The number of bytes that a call may use, the default for None."""
    if value is None:
        return DEFAULT_WORKSPACE
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: workspace_bytes is {value!r}, takes None or a positive number of bytes")
    if value <= 0:
        raise ValueError(f"{op}: workspace_bytes is {value}, takes None or a positive number of bytes")
    return value


def projections(op, name, values, count, optional):
    """A sequence of `count` tensors (or Nones) as a list."""
    if values is None and optional:
        return [None] * count
    if not isinstance(values, list | tuple):
        raise TypeError(f"{op}: {name} is a {type(values).__name__}, takes a sequence of {count}")
    if len(values) != count:
        raise ValueError(f"{op}: {name} has {len(values)} entries, takes {count}: for q, k and v")
    return list(values)


def autocast(*tensors):
    """The tensors as autocast would have them: float32 and halves in its dtype, others as they are."""
    if not autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t for t in tensors)


def autocast_enabled(t):
    """Whether autocast is on for the device of a tensor; never for one that has none, such as meta."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = t.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def is_readable(t):
    """Whether the values of an index tensor can be read here without waiting for a device."""
    return t.device.type == "cpu" and type(t) is torch.Tensor


def check_index(index, table_rows, what):
    """The values of an index as a list; ValueError where one lies outside its table."""
    values = index.tolist()
    if values and not (min(values) >= 0 and max(values) < table_rows):
        at = next(i for i, v in enumerate(values) if not 0 <= v < table_rows)
        raise ValueError(f"{what}[{at}] is {values[at]}, takes 0 to {table_rows - 1}: rows of a table of {table_rows}")
    return values


def check_bounds(cu_seqlens, rows):
    """The values of cu_seqlens as a list; ValueError unless they rise from 0 to the number of rows."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}, takes 0 to {rows}: the rows of x")
    for i, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if hi < lo:
            raise ValueError(f"cu_seqlens[{i + 1}] is {hi} after {lo}, takes values that never fall")
    return bounds

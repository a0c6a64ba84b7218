"""Checks of what callers pass. Every error names the function, the argument, what it got and what it must be."""

import numbers
import operator

import torch

from .dtypes import FLOATS, HALVES, mixes, name_of
from .plan import default_workspace


def _names(dtypes):
    return " or ".join(map(name_of, dtypes))


def tensor(op, name, t, ndims, takes):
    """`t` is a strided tensor of one of the numbers of dimensions `ndims`; `takes` is its shape in words."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; it must be a tensor {takes}")
    if t.layout is not torch.strided or t.is_nested:
        layout = "nested" if t.is_nested else t.layout
        raise TypeError(f"{op}: {name} is a {layout} tensor; it must be a strided tensor {takes}")
    if t.dim() not in ndims:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}; it must be {takes}")


def activation(op, name, t):
    """`t` has a dtype that ctxkern computes with."""
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {_names([t.dtype])}; it must be {_names(FLOATS)}")


def parameter(op, name, t, x):
    """A parameter of activations x: on the same device, in a dtype that kernels read next to that of x."""
    dtype = t.dtype
    if dtype is not x.dtype and not mixes(dtype, x.dtype):
        takes = _names(d for d in FLOATS if mixes(d, x.dtype))
        raise TypeError(f"{op}: {name} is {_names([dtype])} while x is {_names([x.dtype])}; {name} must be {takes}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}; it must be on the device of x, {x.device}")


def shape(op, name, t, expected, takes):
    """`t` has the shape `expected`, `takes` in words."""
    if t.shape != expected:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}; it must be {takes} = {list(expected)}")


def fits(op, name, t, x, expected, takes):
    """`t` is a parameter of x with the shape `expected`, `takes` in words."""
    if (
        isinstance(t, torch.Tensor)
        and t.shape == expected
        and t.dtype is x.dtype
        and t.device == x.device
        and t.layout is torch.strided
        and not t.is_nested
    ):
        return
    tensor(op, name, t, (len(expected),), takes)
    parameter(op, name, t, x)
    shape(op, name, t, expected, takes)


def sequences(op, x, table, table_name, index, index_name, cu_seqlens):
    """The number of sequences agrees between x, the context (or adapter) table, its index and cu_seqlens."""
    if cu_seqlens is None:
        if x.dim() == 2:
            raise ValueError(
                f"{op}: x has shape {list(x.shape)}; it must be [B, S, D], or packed [N, D] together with cu_seqlens"
            )
        batch = x.shape[0]
    else:
        tensor(op, "cu_seqlens", cu_seqlens, (1,), "[B + 1]")
        _integers(op, "cu_seqlens", cu_seqlens, torch.int32, x)
        if x.dim() == 3:
            raise ValueError(f"{op}: x has shape {list(x.shape)}; it must be packed [N, D] when cu_seqlens is given")
        batch = cu_seqlens.shape[0] - 1
        if batch < 0:
            raise ValueError(f"{op}: cu_seqlens has shape [0]; it must be [B + 1], from 0 to N")
    if index is not None:
        tensor(op, index_name, index, (1,), "[B]")
        _integers(op, index_name, index, torch.int64, x)
        shape(op, index_name, index, (batch,), "[B]")
    elif table.shape[0] != batch:
        raise ValueError(
            f"{op}: {table_name} has {table.shape[0]} rows for {batch} sequences; it must have one row per sequence, "
            f"or {index_name} [B] must say which row each sequence uses"
        )


def _integers(op, name, t, dtype, x):
    if t.dtype is not dtype:
        raise TypeError(f"{op}: {name} is {_names([t.dtype])}; it must be {_names([dtype])}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}; it must be on the device of x, {x.device}")


def workspace(op, value, x):
    """The number of bytes that a call may use, the default of the device of x for None."""
    if value is None:
        return default_workspace(x.device.type)
    takes = "it must be None or a positive number of bytes"
    try:
        if isinstance(value, bool):
            raise TypeError
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: workspace_bytes is {value!r}; {takes}") from None
    if size <= 0:
        raise ValueError(f"{op}: workspace_bytes is {value}; {takes}")
    return size


def number(op, name, value):
    """`value` as a float; numpy's numbers are numbers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {value!r}; it must be a number")
    return float(value)


def constant(op, name, t, dtype, x, expected, takes):
    """`t` is a tensor of `dtype` and shape `expected` on the device of x, and has no gradient."""
    tensor(op, name, t, (len(expected),), takes)
    _integers(op, name, t, dtype, x)
    shape(op, name, t, expected, takes)
    if t.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient; it must not, there is none: pass {name}.detach()")


def share(op, name, value):
    """`value` as a float from 0 to below 1."""
    value = number(op, name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{op}: {name} is {value}; it must be from 0 to below 1")
    return value


def seed(op, value, x):
    """A seed as an int64 tensor on the device of x; None: one that torch's generator draws."""
    if value is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=x.device)
    takes = "it must be None, an int, or an int64 tensor with one element"
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.int64:
            raise TypeError(f"{op}: seed is {_names([value.dtype])}; {takes}")
        if value.numel() != 1:
            raise ValueError(f"{op}: seed has shape {list(value.shape)}; {takes}")
        return value.view(()).to(x.device)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: seed is {value!r}; {takes}")
    return torch.tensor((value + (1 << 63)) % (1 << 64) - (1 << 63), device=x.device)


def projections(op, name, values, count, optional):
    """A sequence of `count` tensors (or Nones) as a list."""
    if values is None and optional:
        return [None] * count
    if not isinstance(values, list | tuple):
        raise TypeError(f"{op}: {name} is a {type(values).__name__}; it must be a sequence of {count}")
    if len(values) != count:
        raise ValueError(f"{op}: {name} has {len(values)} entries; it must have {count}: for q, k and v")
    return list(values)


def autocast_enabled(t):
    """Whether autocast is on for the device of a tensor; never for one that has none, such as meta."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = t.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(x, parameters):
    """(x, parameters) as autocast would have them: activations in its dtype, and parameters in another half too, as
    torch's own layers cast them; float32 parameters are read as they are, and float64 is left alone."""
    if not autocast_enabled(x) or x.dtype is torch.float64:
        return x, parameters
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [t.to(dtype) if t is not None and t.dtype in HALVES and t.dtype is not dtype else t for t in parameters]
    return x.to(dtype) if x.dtype in FLOATS else x, cast


def is_readable(t):
    """Whether the values of an index tensor can be read here without waiting for a device."""
    return t.device.type == "cpu" and type(t) is torch.Tensor


def check_index(index, table_rows, what, lowest=0):
    """The values of an index as a list; ValueError where one lies outside its table. lowest: −1 where that is none."""
    values = index.tolist()
    if values and not (min(values) >= lowest and max(values) < table_rows):
        at = next(i for i, v in enumerate(values) if not lowest <= v < table_rows)
        none = " (-1: none)" if lowest < 0 else ""
        raise ValueError(
            f"{what}[{at}] is {values[at]}; it must be from {lowest} to {table_rows - 1}{none}, "
            f"a row of a table of {table_rows}"
        )
    return values


def check_ranks(ranks, most):
    """ValueError unless every rank lies between 0 and that of A and B."""
    for i, rank in enumerate(ranks.tolist()):
        if not 0 <= rank <= most:
            raise ValueError(f"ranks[{i}] is {rank}; it must be from 0 to {most}, the rank of A and B")


def check_bounds(cu_seqlens, rows):
    """The values of cu_seqlens as a list; ValueError unless they rise from 0 to the number of rows."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to {rows}, the number of rows of x"
        )
    for i, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if hi < lo:
            raise ValueError(f"cu_seqlens[{i + 1}] is {hi} after {lo}; cu_seqlens must be non-decreasing")
    return bounds

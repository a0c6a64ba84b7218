"""Whether a model fits, asked before its memory is taken: Linux kills a process that takes too much, without a word."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
# parameters, gradients and Adam's two moments
_COPIES = 4
_CGROUP = Path("/sys/fs/cgroup")


def _read_number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def free_bytes(device: torch.device) -> int | None:
    """The memory that `device` has left for this process, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    kibibytes = _read_number(Path("/proc/meminfo"), r"^MemAvailable:\s+(\d+) kB")
    free = [] if kibibytes is None else [kibibytes * 1024]
    limit, used = (_read_number(_CGROUP / name, r"^(\d+)$") for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        # files kept in memory make room
        free.append(limit - used + (_read_number(_CGROUP / "memory.stat", r"^inactive_file (\d+)$") or 0))
    return min(free, default=None)


def build_model(make: Callable[[], Model], device: torch.device, dtype: torch.dtype, sizes: str) -> Model:
    """The model that `make` builds, on `device` in `dtype`, if there is memory to train it.

    Args:
        make: called twice: once without memory, to count parameters.
        device, dtype: of the parameters.
        sizes: the settings to lower, for the message.

    Raises:
        ValueError: too large.
    """
    gibibytes = None
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make().parameters())
        gibibytes = count * dtype.itemsize * _COPIES / 2**30
        free = free_bytes(device)
        if free is None or gibibytes * 2**30 <= free:
            return make().to(device=device, dtype=dtype)
        has = f", and {device} has {free / 2**30:,.1f} GiB free"
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        if not is_out_of_memory(error):
            raise
        has = f", and {device} has less"
    needs = "more memory than can be counted" if gibibytes is None else f"about {gibibytes:,.1f} GiB"
    raise ValueError(f"the model is too large: with gradients and optimizer state it needs {needs}{has}; lower {sizes}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, or the range of sizes, is exhausted."""
    if isinstance(error, MemoryError | OverflowError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "overflow", "too large", "must be (int")
    return isinstance(error, RuntimeError | TypeError) and any(word in str(error).lower() for word in words)


def peak_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

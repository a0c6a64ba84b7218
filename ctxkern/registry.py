"""Which backends there are, which of them can run here and take a call, and why the others cannot.

The kernels of a family for a backend are the module `ctxkern.<family>.<backend>`, imported with its first call.
"""

import importlib
import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .dtypes import KERNEL_FLOATS, name_of
from .plan import forced
from .runtime import cpu, cuda

NAMES = ("reference", "portable", "cpu", "triton", "cuda")
# backends for a kind of device, the best first, and which families they have kernels for; portable takes the rest
_BEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_EVERY = ("modulated", "lora", "factored")
_FAMILIES = {"cpu": _EVERY, "triton": _EVERY, "cuda": _EVERY}
# the oldest compute capability that the GPU kernels are built for
_CAPABILITY = (8, 0)


class Status(str):
    """ "available", or the reason why a backend is not there; true in a condition exactly when it is available."""

    __slots__ = ()

    def __bool__(self):
        return self == "available"


class _Statuses(dict):
    """By name, each found out when it is first asked for, as that may load a library or wake a GPU."""

    def __missing__(self, name):
        self[name] = Status(_MISSING[name]() or "available")
        return self[name]


statuses = _Statuses()


def backends() -> dict[str, Status]:
    """{name: Status} of every backend: `str(status)` is "available" or the reason why not, `bool(status)` says which.

    reference: the specification, plain einsums that build a weight per sequence. portable: strips in plain PyTorch, any
    device. cpu: C++. triton, cuda: GPU kernels.

    Example:
        >>> {name: str(status) for name, status in ctxkern.backends().items()}
    """
    return {name: statuses[name] for name in NAMES}


def _without_triton():
    """Why Triton kernels cannot run here, or ""; nothing is imported to find out."""
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:
        found = None
    if found is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    return _without_launcher()


def _without_launcher():
    """Why Triton cannot build its launcher, a C extension that it compiles at the first call, or ""."""
    named = os.environ.get("CC")
    if not (shutil.which(named) if named else any(map(shutil.which, ("gcc", "clang")))):
        return (
            f"Triton needs a C compiler to build its launcher: {f'CC={named}' if named else 'gcc or clang'} not found"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"Triton needs Python's headers to build its launcher: {header} not found"


def _without_cuda():
    """Why CUDA C++ kernels cannot run here, or ""; they are loaded only where there is something to run them on."""
    if cuda.missing():
        return cuda.missing()
    if cuda.emulated() or torch.cuda.is_available():
        return cuda.reason()
    return "no GPU: torch.cuda.is_available() is False"


# why each is not there, or ""
_MISSING = {
    "reference": str,
    "portable": str,
    "cpu": cpu.reason,
    "triton": _without_triton,
    "cuda": _without_cuda,
}


def interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# backends for GPUs whose kernels are run on the CPU, in tests
_ON_CPU = {"triton": interpreted, "cuda": cuda.emulated}


def _best(device, dtype, family):
    for name in _BEST.get(device.type, ()):
        if statuses[name] and not _refusal(name, device, dtype, family):
            return name
    return "portable"


@cache
def _too_old(device):
    """Why the GPU kernels cannot run on a device, or ""."""
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip or found >= _CAPABILITY:
        return ""
    major, minor = found
    return f"needs a GPU of compute capability 8.0 or later; {torch.cuda.get_device_name(device)} has {major}.{minor}"


def _refusal(name, device, dtype, family):
    """Why a backend that is there does not take a call, or ""."""
    if name not in _FAMILIES:
        return ""
    runs_on = "cpu" if name == "cpu" or _ON_CPU[name]() else "cuda"
    if device.type != runs_on:
        return f"takes tensors on {'the CPU' if runs_on == 'cpu' else 'a GPU'}, not on {device.type}"
    if dtype not in KERNEL_FLOATS:
        *names, last = map(name_of, KERNEL_FLOATS)
        return f"takes {', '.join(names)} or {last}, not {name_of(dtype)}"
    if name == "triton" and dtype is torch.bfloat16 and interpreted():
        return "takes float32 or float16 in Triton's interpreter, whose bfloat16 products are wrong"
    if family not in _FAMILIES[name]:
        return f"has no kernels of the {family} family"
    if runs_on == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _too_old(index) or (cuda.refusal(index) if name == "cuda" else "")
    return ""


def resolve(name, device, dtype, family):
    """The name of the backend that runs: `name` itself, never another, or the best one there for None.

    Raises ValueError for a name that no backend has, RuntimeError for one that cannot run here or does not take this.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend is {name!r}; it must be None or one of {', '.join(map(repr, NAMES))}")
    key = family, name or forced.backend, device, dtype
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _resolve(key[1], device, dtype, family)
    return found


# by what was asked for: family, name, device, dtype
_chosen: dict[tuple, str] = {}
_modules: dict[tuple, ModuleType] = {}


def _resolve(name, device, dtype, family):
    if name is None:
        return _best(device, dtype, family)
    status = statuses[name]
    if not status:
        raise RuntimeError(f"backend {name!r} cannot run here: {status}")
    refusal = _refusal(name, device, dtype, family)
    if refusal:
        raise RuntimeError(f"backend {name!r} {refusal}")
    return name


def forget():
    """What was found out is found out again, for tests that change what is there."""
    statuses.clear()
    _chosen.clear()
    _modules.clear()
    _too_old.cache_clear()


def implementation(family, name, x):
    """The module with the kernels of a family that run for activations like x; `name` as in `resolve`."""
    key = family, name or forced.backend, x.device, x.dtype
    module = _modules.get(key)
    if module is None:
        found = resolve(name, x.device, x.dtype, family)
        module = _modules[key] = importlib.import_module(f"{__package__}.{family}.{found}")
    return module

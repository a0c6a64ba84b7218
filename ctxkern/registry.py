"""Which implementations there are, which of them can run here, and why the others cannot.

A backend is a module with `modulated_forward` and `modulated_backward`, `lora_forward` and `lora_backward`, and
`plan_call`; none imports another.
"""

import importlib
import importlib.util
import os

import torch

from .runtime import cpu, cuda

NAMES = ("reference", "portable", "cpu", "triton", "cuda")


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


def backends():
    """{name: Status} of every backend: `str(status)` is "available" or the reason why not, `bool(status)` tells which.

    reference: the specification, plain einsums that build a weight a sequence. portable: strips in plain PyTorch, any
    device. cpu: C++. triton, cuda: GPU kernels.
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
    if torch.cuda.is_available() or interpreted():
        return ""
    return "no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 runs it on the CPU, for tests)"


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


def interpreted():
    """Whether Triton's interpreter runs its kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_BEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def _best(device_type, dtype, family):
    for name in _BEST.get(device_type, ()):
        if statuses[name] and not _refusal(name, device_type, dtype, family):
            return name
    return "portable"


_FAMILIES = {"cpu": ("modulated",), "triton": ("modulated",), "cuda": ("modulated",)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# backends for GPUs whose kernels are run on the CPU, in tests
_ON_CPU = {"triton": interpreted, "cuda": cuda.emulated}


def _refusal(name, device_type, dtype, family):
    """Why a backend that is there does not take a call, or ""."""
    if name not in _FAMILIES:
        return ""
    device = "cpu" if name == "cpu" or _ON_CPU[name]() else "cuda"
    if device_type != device:
        return f"takes tensors on {'the CPU' if device == 'cpu' else 'a GPU'}, not on {device_type}"
    if dtype not in _DTYPES:
        return f"takes float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if name == "triton" and dtype is torch.bfloat16 and interpreted():
        return "takes float32 or float16 in Triton's interpreter, whose bfloat16 products are wrong"
    if family not in _FAMILIES[name]:
        return f"has no kernels of the {family} family"
    if name == "cuda" and device == "cuda":
        return cuda.refusal(torch.cuda.current_device())
    return ""


def resolve(name, device_type, dtype, family):
    """The name of the backend that runs: `name` itself, never another, or the best one there for None.

    Under a compiler nothing is loaded to find out: that is left to the call (`implementation`).

    Raises ValueError for a name that no backend has, RuntimeError for one that cannot run here or does not take this.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend is {name!r}, takes None or one of {', '.join(map(repr, NAMES))}")
    if torch.compiler.is_compiling() and name != "reference":
        return _LATER + (name or "")
    if name is None:
        return _best(device_type, dtype, family)
    status = statuses[name]
    if not status:
        raise RuntimeError(f"backend {name!r} cannot run here: {status}")
    refusal = _refusal(name, device_type, dtype, family)
    if refusal:
        raise RuntimeError(f"backend {name!r} {refusal}")
    return name


_IMPLEMENTATIONS = {}


# before a name that was not looked up when it was given
_LATER = "later "


def implementation(name, x, family):
    """The module of a backend that has kernels behind the operators; what a compiler left open is resolved now, for
    activations x and a family of operators."""
    module = _IMPLEMENTATIONS.get((family, name))
    if module is None:
        if name.startswith(_LATER):
            asked = name.removeprefix(_LATER) or None
            return implementation(resolve(asked, x.device.type, x.dtype, family), x, family)
        # the others import Triton or load kernels, with their first call
        module = _IMPLEMENTATIONS[family, name] = importlib.import_module(f"{__package__}.{family}.{name}")
    return module

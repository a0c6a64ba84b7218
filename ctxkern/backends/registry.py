"""Which implementations there are, which of them can run here, and why the others cannot.

A backend is a module with `modulated_forward` and `modulated_backward`, `lora_forward` and `lora_backward`, and
`plan_call`; none imports another.
"""

from functools import lru_cache

import torch

from .. import _compiled
from . import cpu, portable

NAMES = ("reference", "portable", "cpu", "triton", "cuda")


class Status(str):
    """ "available", or the reason why a backend is not there; true in a condition exactly when it is available."""

    __slots__ = ()

    def __bool__(self):
        return self == "available"


_AVAILABLE = Status("available")


@lru_cache(maxsize=1)
def backends():
    """{name: Status} of every backend: `str(status)` is "available" or the reason why not, `bool(status)` tells which.

    reference: the specification, plain einsums that build a weight a sequence. portable: strips in plain PyTorch, any
    device. cpu: C++. triton, cuda: GPU kernels.
    """
    missing = "this version has no {} kernels"
    return {
        "reference": _AVAILABLE,
        "portable": _AVAILABLE,
        "cpu": Status(_compiled.reason() or "available"),
        "triton": Status(missing.format("Triton")),
        "cuda": Status(missing.format("CUDA")),
    }


def _best(device_type, dtype, family):
    return "cpu" if backends()["cpu"] and not _refusal("cpu", device_type, dtype, family) else "portable"


def _refusal(name, device_type, dtype, family):
    """Why a backend that is there does not take a call, or ""."""
    if name != "cpu":
        return ""
    if device_type != "cpu":
        return f"takes tensors on the CPU, not on {device_type}"
    if not cpu.takes(dtype):
        return f"takes float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return "" if family in cpu.FAMILIES else f"has no kernels of the {family} family"


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
    status = backends()[name]
    if not status:
        raise RuntimeError(f"backend {name!r} cannot run here: {status}")
    refusal = _refusal(name, device_type, dtype, family)
    if refusal:
        raise RuntimeError(f"backend {name!r} {refusal}")
    return name


_IMPLEMENTATIONS = {"portable": portable, "cpu": cpu}
# before a name that was not looked up when it was given
_LATER = "later "


def implementation(name, x, family):
    """The module of a backend that has kernels behind the operators; what a compiler left open is resolved now, for
    activations x and a family of operators."""
    module = _IMPLEMENTATIONS.get(name)
    if module is None:
        asked = name.removeprefix(_LATER) or None
        module = _IMPLEMENTATIONS[resolve(asked, x.device.type, x.dtype, family)]
    return module

"""Loads the CUDA kernels, a library without torch, when they are first asked for, and says why they are missing."""

import ctypes
import functools
import os
from contextlib import nullcontext
from pathlib import Path

import torch

from . import cpu
from .problem import LoraProblem, Problem, difference

# csrc/cuda/runtime/library.cu
_ABI = 5
# a workspace begins at a multiple of it
_ALIGNED = 256


def _path():
    return Path(os.environ.get("CTXKERN_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda_kernels.so")


def missing():
    """Why there is no library, or ''; nothing is loaded to find out."""
    if _path().exists():
        return ""
    cuda = cpu.build_info().get("cuda", {})
    return f"built without CUDA kernels because {cuda.get('reason') or 'nothing was built: run pip install .'}"


@functools.cache
def _attempt():
    path = _path()
    if missing():
        return None, missing()
    try:
        library = ctypes.CDLL(str(path))
        found = library.ctxkern_cuda_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    if found != _ABI:
        return None, f"{path.name} is of another version ({found}, not {_ABI}): run pip install . again"
    library.ctxkern_cuda_problem_layout.restype = ctypes.c_char_p
    wrong = difference(library.ctxkern_cuda_problem_layout().decode())
    if wrong:
        return None, f"{path.name} does not fit this package: {wrong}: run pip install . again"
    if cpu.reason():
        return None, f"_C, which fills what its kernels read, is not available: {cpu.reason()}"
    library.ctxkern_cuda_unusable.restype = ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_int64)
    for family, problem in (("modulated", Problem), ("lora", LoraProblem)):
        entry = getattr(library, f"ctxkern_cuda_{family}")
        entry.restype = ctypes.c_char_p
        # problem, backward, device, workspace, bytes that it must hold, stream
        entry.argtypes = ctypes.POINTER(problem), ctypes.c_int, ctypes.c_int, ctypes.c_void_p, size, ctypes.c_void_p
    library.ctxkern_cuda_modulated_tiles.argtypes = ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int64 * 5
    library.ctxkern_cuda_modulated_tiles.restype = None
    return library, ""


def load():
    """The library. Raises RuntimeError where there is none, with the reason."""
    library, reason = _attempt()
    if library is None:
        raise RuntimeError(f"the CUDA kernels are not available: {reason}")
    return library


def run(entry, problem, backward, device, what):
    """Launches the kernels of an entry point on the stream in use, in a workspace of torch's.

    Raises RuntimeError or torch.OutOfMemoryError with `what`, which names the call, and the cause.
    """
    size = ctypes.c_int64(0)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        address = workspace = None
        for launches in (False, True):
            if launches:
                workspace = _workspace(size.value, device, what)
                address = -(-workspace.data_ptr() // _ALIGNED) * _ALIGNED
            error = entry(problem, backward, device.index or 0, address, size, stream)
            if error:
                raise RuntimeError(f"{what} failed: {error.decode()}")


def _workspace(size, device, what):
    try:
        return torch.empty(size + _ALIGNED, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{what} has no memory for its workspace of {size} bytes: {error}") from error


def emulated():
    """Whether the library's kernels run on the CPU: one that CTXKERN_CUDA_LIBRARY names, for tests."""
    if "CTXKERN_CUDA_LIBRARY" not in os.environ:
        return False
    library, _ = _attempt()
    return library is not None and bool(library.ctxkern_cuda_emulated())


def reason():
    """Why the library is not available, or ''."""
    return _attempt()[1]


@functools.cache
def refusal(device):
    """Why the library, which is there, cannot run on the GPU of this number, or ''."""
    error = load().ctxkern_cuda_unusable(device)
    return "" if error is None else f"cannot run on this GPU: {error.decode()}"

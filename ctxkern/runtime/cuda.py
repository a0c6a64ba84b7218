"""Loads the CUDA kernels, a library without torch, when they are first asked for, and says why they are missing."""

import ctypes
import functools
import os
from pathlib import Path

from .cpu import build_info
from .problem import Problem, difference

# csrc/cuda/runtime/library.cu
_ABI = 4


def _path():
    return Path(os.environ.get("CTXKERN_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda_kernels.so")


def missing():
    """Why there is no library, or ''; nothing is loaded to find out."""
    if _path().exists():
        return ""
    cuda = build_info().get("cuda", {})
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
    library.ctxkern_cuda_modulated.restype = library.ctxkern_cuda_unusable.restype = ctypes.c_char_p
    problem, size = ctypes.POINTER(Problem), ctypes.POINTER(ctypes.c_int64)
    # problem, backward, device, workspace, bytes that it must hold, stream
    library.ctxkern_cuda_modulated.argtypes = (
        problem,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        size,
        ctypes.c_void_p,
    )
    library.ctxkern_cuda_modulated_tiles.argtypes = problem, ctypes.c_int, ctypes.c_int64 * 5
    library.ctxkern_cuda_modulated_tiles.restype = None
    return library, ""


def load():
    """The library. Raises RuntimeError where there is none, with the reason."""
    library, reason = _attempt()
    if library is None:
        raise RuntimeError(f"the CUDA kernels are not available: {reason}")
    return library


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

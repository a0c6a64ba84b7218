"""Tensors that end where a page of memory does, with an unreadable page after it: who reads past them dies."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch

import ctxkern

_kept = []


def at_the_end(t):
    """A copy of a tensor, dense, in such memory, which is never freed; None for None."""
    if t is None:
        return t
    size = t.numel() * t.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    _kept.append(memory)
    made = torch.frombuffer(memory, dtype=t.dtype, offset=whole - size, count=t.numel()).view(t.shape).copy_(t)
    beyond = made.data_ptr() + size
    assert beyond % mmap.PAGESIZE == 0
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(beyond), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
    return made


def survives(code):
    """Whether a fresh process with this very package and these helpers runs `code` to its end, or how it ended."""
    paths = Path(ctxkern.__file__).parents[1], Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('to the end')"],
        cwd="/",
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.endswith("to the end\n") or f"{done.returncode} {done.stderr[-2000:]}"

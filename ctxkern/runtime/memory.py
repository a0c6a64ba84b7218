"""Memory on the CPU: for large results, kept for a while after they are dropped (csrc/cpu/runtime/memory.h).

The system clears new memory, which takes about as long as filling it, and the C library gives back blocks of 32 MiB and
more as soon as they are free: at D = E = 1024, K = 64 in float32 a third of a training step was that (bench/LOG.md).
CTXKERN_KEPT_SECONDS: how long, 10 unless set, 0 for not at all; the first call after that gives it back.
"""

import torch

from . import cpu


def kept_bytes() -> int:
    """Bytes of dropped results that are kept."""
    return cpu.load().kept_bytes()


def release() -> None:
    """Gives them back to the system."""
    cpu.load().release_kept(0.0)


def workspace(size):
    """`size` bytes that kernels work in, by torch's allocator, so that they count among what a call takes."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def empty_like(t):
    """torch.empty_like on the CPU, for results of 8 MiB and more: allocators keep smaller ones themselves."""
    try:
        memory = cpu.load().LargeMemory(t.nbytes)
    except MemoryError:
        # torch's own error says how much there is
        return torch.empty_like(t)
    stride = t.stride() if t.is_contiguous() else torch.empty_like(t, device="meta").stride()
    return torch.frombuffer(memory, dtype=t.dtype).as_strided_(t.shape, stride)

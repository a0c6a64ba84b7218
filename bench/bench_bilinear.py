"""ctxkern.bilinear against torch's, whose backward loops over the outputs: it runs once, within a limit, in a separate
process."""

import functools
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import ctxkern
from ctxkern.testing.measure import interleaved
from ctxkern.testing.oracle import check_family

SHAPE = (16, 128, 256, 256, 32)
# seconds after which torch's forward and backward is given up and counted as this long
LIMIT = 120


def _tensors(shape, generator):
    B, S, D, E, K = shape
    sizes = {"input1": (B, S, D), "input2": (B, S, K), "weight": (E, D, K), "bias": (E,)}
    tensors = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    tensors["weight"] *= (D * K) ** -0.5
    return tensors, torch.randn(B, S, E, generator=generator)


def _forward_backward(fn, tensors, dout):
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    return torch.autograd.grad(fn(*leaves), leaves, dout)


def _torch_once():
    tensors, dout = _tensors(SHAPE, torch.Generator().manual_seed(0))
    started = time.perf_counter()
    _forward_backward(F.bilinear, tensors, dout)
    return time.perf_counter() - started


def _torch_bounded():
    """Seconds of torch's forward and backward, LIMIT where it takes longer."""
    command = [sys.executable, __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return LIMIT
    return float(done.stdout)


def test_bilinear_forward_backward(benchmark, capsys):
    generator = torch.Generator().manual_seed(0)
    # the budget at a size at which torch's own backward ends soon, then the time at the size of the claim
    check_family(ctxkern.bilinear, F.bilinear, *_tensors((2, 16, 64, 48, 32), generator), "bilinear")
    tensors, dout = _tensors(SHAPE, generator)
    mine = interleaved({"ctxkern": functools.partial(_forward_backward, ctxkern.bilinear, tensors, dout)}, 3.0)
    forward = interleaved({"ctxkern": lambda: ctxkern.bilinear(**tensors), "torch": lambda: F.bilinear(**tensors)}, 3.0)
    forward_ratio = forward["torch"].p50 / forward["ctxkern"].p50
    torchs = _torch_bounded()
    ratio = torchs / mine["ctxkern"].p50
    benchmark.extra_info.update({"torch_s": torchs, "ratio": ratio, "forward_ratio": forward_ratio})
    benchmark.pedantic(_forward_backward, (ctxkern.bilinear, tensors, dout), rounds=3)
    with capsys.disabled():
        own = mine["ctxkern"].p50 * 1e3
        print(f"\nbilinear {SHAPE}: ctxkern {own:.0f} ms, torch {torchs * 1e3:.0f} ms: {ratio:.0f} times as fast")
        print(f"forward alone: {forward_ratio:.2f} times as fast")
    assert ratio > 1


if __name__ == "__main__":
    print(_torch_once())

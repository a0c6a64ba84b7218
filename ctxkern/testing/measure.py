"""Measuring: interleaved times, peak memory, and the ceilings of the machine in the same run."""

import contextlib
import gc
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Percentiles of the time of one call, in seconds, over `rounds` rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def interleaved(fns, seconds=1.0, min_rounds=5, max_rounds=200, device="cpu"):
    """{name: Timing} of callables, one call of each a round, so that a slow moment of the machine meets all of them, in
    another order every round: what one leaves in caches and in the allocator would else always meet the same next.

    seconds: the time aimed at for all rounds together. Each callable runs twice before: what a library sets up for a
    new shape would else count as the time of a round.
    """
    samples = {name: [] for name in fns}
    for fn in fns.values():
        _timed(fn, device)
    started = time.perf_counter()
    for fn in fns.values():
        _timed(fn, device)
    a_round = time.perf_counter() - started
    rounds = int(min(max(seconds / max(a_round, 1e-9), min_rounds), max_rounds))
    order, shuffler = list(fns), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(_timed(fns[name], device))
    return {name: _percentiles(values) for name, values in samples.items()}


def _timed(fn, device):
    """Seconds from the beginning of fn() to the end of its work; on a GPU by its own clock, after a sleep during which
    fn() is issued."""
    if torch.device(device).type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_SLEEP)
        before.record()
        fn()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


# cycles, some 100 µs: longer than the host takes to launch a graph
_SLEEP = 200_000


def _percentiles(values):
    values = sorted(values)
    at = [values[round(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8)]
    return Timing(*at, len(values))


def captured(fn):
    """(replay, results) of fn() in a CUDA graph, after a few runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fn()
    return graph.replay, results


def peak_extra_bytes(fn, device="cpu"):
    """The most memory that torch's allocator held at once during fn(), beyond what it held before and what the result
    of fn() holds: the temporaries, in bytes."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        kept = fn()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del kept
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    # garbage of before, freed meanwhile, would hide as much that fn() allocates
    gc.collect()
    gc.disable()
    try:
        with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            kept = fn()
    finally:
        gc.enable()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak - held


@contextlib.contextmanager
def _quiet():
    """Without what the profiler's library writes to the standard error stream by itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def times(fn, device="cpu", runs=10):
    """Seconds of so many calls of fn(), after one more."""
    fn()
    return [_timed(fn, device) for _ in range(runs)]


def _fast(fn, device, seconds=2.0, least=4):
    """The 20th percentile of the seconds of at least so many runs in so many seconds."""
    runs, end = [], time.perf_counter() + seconds
    while len(runs) < least or time.perf_counter() < end:
        runs.append(_timed(fn, device))
    return sorted(runs)[len(runs) // 5]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in this run: FLOP/s of a large product and bytes/s of a large read and write."""

    flops: float
    bandwidth: float

    def floor(self, flops, moved):
        """Seconds that the operations or the bytes take at those rates, whichever is more."""
        return max(flops / self.flops, moved / self.bandwidth)


def large_product(dtype, device="cpu", size=None):
    """(callable, FLOPs) of a product that shows the rate of a device: on a CPU four in a row, so that what others left
    in its caches does not count."""
    on_gpu = torch.device(device).type == "cuda"
    size, times = size or (8192 if on_gpu else 1024), 1 if on_gpu else 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def products():
        for _ in range(times):
            a @ b

    return products, times * 2 * size**3


def ceilings(dtype, device="cpu", size=None):
    """The `Ceilings` of a device for a dtype, by 20th percentiles of two seconds each: the threads of a process may
    share a core for the first of them."""
    products, flops = large_product(dtype, device, size)
    source = torch.randn((256 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copy = _fast(lambda: target.copy_(source), device)
    return Ceilings(flops / _fast(products, device), 2 * source.numel() * 4 / copy)


def provenance(device="cpu"):
    """{column: value} that every row of results carries."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device="cpu"):
    """The processor's or GPU's own name; with its family and model where that says neither, as in virtual machines."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = first.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in first or any(c.isdigit() for c in name):
        return name
    return f"{name} family {first['cpu family']} model {first['model']}"


def _git(*args):
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

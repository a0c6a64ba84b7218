"""The numerical self-test of `ctxkern check`: every backend that is there, over the case table, in every dtype."""

import functools
import time

import torch
import torch.nn.functional as F

from ctxkern.dtypes import KERNEL_FLOATS
from ctxkern.functional import bilinear, factored_modulated_linear, lora_linear, modulated_linear
from ctxkern.reference import factored_modulated_linear_ref, lora_linear_ref
from ctxkern.registry import backends

from .cases import CASES, make_inputs
from .families import factored_arguments, lora_arguments
from .oracle import check, check_family

_DTYPES = (
    *((dtype, dtype) for dtype in KERNEL_FLOATS),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)
# of Triton on a GPU, which compiles for every case: bench/gpu.py has the rest
_COMPILED_CASES = ("odd", "shared-uneven", "ragged-shared", "decode", "context-per-token")
_SIBLING_CASES = ("odd", "shared-uneven", "ragged")


def self_tests():
    """Yields (title, failures, number of checks, seconds) a backend, device and family; failures are messages."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name, status in backends().items():
        for device in devices:
            if status and _runs_on(name, device):
                yield _timed(f"{name} on {device}", _modulated(name, device))
    yield _timed("bilinear, lora, factored on cpu", _siblings())


def _runs_on(backend, device):
    return {"cpu": device == "cpu", "triton": device == "cuda", "cuda": device == "cuda"}.get(backend, True)


def _timed(title, checks):
    started = time.perf_counter()
    failures, count = [], 0
    for run in checks:
        count += 1
        try:
            run()
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            failures.append(str(error).splitlines()[0])
    return title, failures, count, time.perf_counter() - started


def _modulated(backend, device):
    fn = functools.partial(modulated_linear, backend=backend)
    pairs = [p for p in _DTYPES if backend in ("reference", "portable") or p[0] is not torch.float64]
    for case in CASES:
        if backend == "triton" and device == "cuda" and case.id not in _COMPILED_CASES:
            continue
        for dtype, param_dtype in pairs:
            yield functools.partial(check, fn, make_inputs(case, dtype, param_dtype, device), case.id)


def _siblings():
    generator = torch.Generator().manual_seed(0)
    for dtype, _ in _DTYPES[:3]:
        shapes = {"input1": (6, 4, 9), "input2": (6, 4, 5), "weight": (7, 9, 5), "bias": (7,)}
        tensors = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        dout = torch.randn(6, 4, 7, generator=generator).to(dtype)
        yield functools.partial(check_family, bilinear, F.bilinear, tensors, dout, "bilinear")
        for case in CASES:
            if case.id in _SIBLING_CASES:
                lora, factored = lora_arguments(case, 3, dtype), factored_arguments(case, 5, dtype)
                yield functools.partial(check_family, lora_linear, lora_linear_ref, *lora, f"lora_linear {case.id}")
                yield functools.partial(
                    check_family,
                    factored_modulated_linear,
                    factored_modulated_linear_ref,
                    *factored,
                    f"factored_modulated_linear {case.id}",
                )

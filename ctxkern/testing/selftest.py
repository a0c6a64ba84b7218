"""The numerical self-test of `ctxkern check`: every backend that is there, over the small cases, in every dtype."""

import functools
import time

import torch
import torch.nn.functional as F

from ctxkern.backends.registry import backends
from ctxkern.functional import bilinear, factored_modulated_linear, lora_linear, modulated_linear
from ctxkern.reference import factored_modulated_linear_ref, lora_linear_ref

from .cases import CASES, make_inputs
from .oracle import assert_matches, check, run_tensors

_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)


def self_tests():
    """Yields (title, failures, number of checks, seconds) a backend, device and family; failures are messages."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name, status in backends().items():
        if not status:
            continue
        for device in devices:
            if (name == "cpu" and device != "cpu") or (name in ("triton", "cuda") and device == "cpu"):
                continue
            yield _timed(f"{name} on {device}", _modulated(name, device))
    yield _timed("bilinear, lora, factored on cpu", _siblings())


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
    for case in CASES:
        for dtype, param_dtype in _DTYPES:
            inputs = make_inputs(case, dtype, param_dtype, device)
            yield functools.partial(check, functools.partial(modulated_linear, backend=backend), inputs, case.id)


def _siblings():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.tensor([2, 0, 2])
    families = {
        "bilinear": (bilinear, F.bilinear, (normal(6, 4, 9), normal(6, 4, 5), normal(7, 9, 5), normal(7)), {}),
        "lora_linear": (
            functools.partial(lora_linear, scale=0.5),
            functools.partial(lora_linear_ref, scale=0.5),
            (normal(3, 8, 12), normal(10, 12), normal(4, 3, 12), normal(4, 10, 3)),
            {"adapter_index": index},
        ),
        "factored_modulated_linear": (
            factored_modulated_linear,
            factored_modulated_linear_ref,
            (normal(3, 8, 12), normal(4, 5), normal(12, 10), normal(12, 6), normal(5, 6), normal(6, 10), normal(10)),
            {"context_index": index},
        ),
    }
    for name, (fn, plain, tensors, keyword) in families.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield functools.partial(_sibling, name, fn, plain, [t.to(dtype) for t in tensors], keyword)


def _sibling(name, fn, plain, tensors, keyword):
    exact = run_tensors(functools.partial(plain, **keyword), [t.double() for t in tensors])
    in_dtype = run_tensors(functools.partial(plain, **keyword), tensors)
    assert_matches(run_tensors(functools.partial(fn, **keyword), tensors), exact, in_dtype, name)

"""What a call on a GPU costs Python, measured without one: python bench/overhead.py

Launches are noted instead of made, so that times hold all but the driver's own: checks, autograd, allocations, laying
launches out or finding them. Sizes are such that memory and products are nothing; they take as many launches as d =
256. For comparison, plain linear layers on the CPU. `first`: launches are forgotten before each call, as in a call of
new sizes.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
# a bare tree is enough
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

import ctxkern
from ctxkern import registry
from ctxkern.runtime.triton import tiles
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import interleaved

CASES = [
    Case("step", 4, 8, 16, 16, 16),
    Case("indexed", 4, 8, 16, 16, 16, rows=2, index=(0, 1, 0, 1)),
    Case("decode", 8, 1, 16, 16, 16),
]


class _Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class _Kernel(CompiledKernel):
    function = packed_metadata = metadata = src = None

    def __init__(self, name):
        self.name = name

    def _init_handles(self):
        pass

    @property
    def run(self):
        return self._run

    def _run(self, x, y, z, stream, function, packed, metadata, enter, exit, *args):
        if enter is not None:
            enter(metadata)
        _LAUNCHES.append((self.name, (x, y, z), args))
        if exit is not None:
            exit(metadata)


_LAUNCHES = []


def _compiled(self, key, signature, device, *_):
    kernel = self.device_caches[device][0][key] = _Kernel(self.fn.__name__)
    return kernel


def note_launches():
    """The list of launches, (kernel, grid, arguments) each, that the backend `triton` makes from now on.

    Kernels are not compiled, tensors lie on the CPU and results hold nothing. For all of a process.
    """
    driver.set_active(_Driver())
    jit.JITFunction._do_compile = _compiled
    registry.statuses["triton"] = registry.Status("available")
    registry._ON_CPU["triton"] = lambda: True
    return _LAUNCHES


def modulated(made, count):
    first = made[0]
    lists = [[one.weight for one in made], [one.bilinear for one in made]]
    fixed = {"context_index": first.context_index, "backend": "triton"}
    if count == 1:
        return lambda: (ctxkern.modulated_linear(first.x, first.context, first.weight, first.bilinear, **fixed),)
    return lambda: ctxkern.modulated_qkv(first.x, first.context, *lists, **fixed)


def step(forward, leaves):
    douts = [torch.zeros_like(y) for y in forward()]

    def run():
        torch.autograd.backward(forward(), douts)
        for leaf in leaves:
            leaf.grad = None

    return run


def emptied(fn, launches):
    def run():
        fn()
        launches.clear()

    return run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for the calls of a case (default: 2)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    launches = note_launches()
    for case in CASES:
        for count in (1, 3):
            made = [make_inputs(case, torch.bfloat16, seed=seed) for seed in range(count)]
            leaves = [t.requires_grad_() for one in made for t in (one.weight, one.bilinear)]
            leaves += [made[0].x.requires_grad_(), made[0].context.requires_grad_()]
            x = torch.zeros(1, 1, 8, requires_grad=True)
            weights = [torch.zeros(8, 8, requires_grad=True) for _ in range(count)]

            forward, linear = modulated(made, count), lambda x=x, weights=weights: [F.linear(x, w) for w in weights]
            fns = {"forward": forward, "step": step(forward, leaves)}
            counts = {}
            for name, fn in fns.items():
                launches.clear()
                fn()
                counts[name] = f"{len(launches)} launches"
            first = {f"{name}, first": lambda fn=fn: (tiles.forget(), fn()) for name, fn in fns.items()}
            fns |= {"forward, linear": linear, "step, linear": step(linear, [x, *weights])}
            for together in (fns, first):
                runs = {name: emptied(fn, launches) for name, fn in together.items()}
                timings = interleaved(runs, args.seconds, max_rounds=2000)
                for name, timing in timings.items():
                    print(
                        f"{case.id:8} {count} {name:16} {timing.p50 * 1e6:7.0f} µs {counts.get(name, '')}", flush=True
                    )


if __name__ == "__main__":
    main()

"""What torch takes for nothing but the products of a training step, next to the whole step of `modulated_linear`.

    python bench/products.py bfloat16      # float32

Each product by itself, from operands in the layout that it takes fastest, into memory that is there: y, dx and the
gradients of all weights by bmm; the weights (twice: a backward that keeps no weight makes them again) and the gradients
of bilinear and context by mm. No bias, no autograd. Shares are of the floor of the bench table. In addition what the
kernels take without autograd and Python, and what they take where reading `bilinear` costs nothing, as all of it is one
row of D that stays in the cache.
"""

import argparse
import contextlib
import dataclasses
import time

import torch

from ctxkern.runtime import cpu
from ctxkern.testing.cases import BENCH_CASES, make_inputs
from ctxkern.testing.measure import ceilings, interleaved
from ctxkern.testing.peers import calls
from ctxkern.testing.report import rows_of


def products(case, dtype):
    """{name: (how often a step has it, [callables that compute it, by layout of an operand])}."""
    rows, d_in, d_out, contexts = case.tokens // case.contexts, case.D, case.E, case.contexts

    def made(*shape):
        return torch.randn(shape).to(dtype)

    x, dy, weights = made(contexts, rows, d_in), made(contexts, rows, d_out), made(contexts, d_in, d_out)
    context, bilinear, flat = made(contexts, case.K), made(d_in * d_out, case.K), weights.view(contexts, -1)
    turned, k_major = weights.mT.contiguous(), bilinear.t().contiguous()

    def each(product, shape, *operands):
        out = torch.empty(shape, dtype=dtype)
        return [lambda pair=pair: product(*pair, out=out) for pair in operands]

    return {
        "y": (1, each(torch.bmm, dy.shape, (x, weights), (x, turned.mT))),
        "dx": (1, each(torch.bmm, x.shape, (dy, weights.mT), (dy, turned))),
        "dW": (1, each(torch.bmm, weights.shape, (x.mT, dy))),
        "W": (2, each(torch.mm, flat.shape, (context, bilinear.t()), (context, k_major))),
        "dbilinear": (1, each(torch.mm, bilinear.shape, (flat.t(), context))),
        "dcontext": (1, each(torch.mm, context.shape, (flat, bilinear), (flat, k_major.t()))),
    }


@torch.no_grad()
def library(step, case, dtype, seconds):
    """(`Timing` of the step, ms of all products by the fastest layout of each, ms of each)."""
    made = products(case, dtype)
    fns = {(name, i): fn for name, (_, layouts) in made.items() for i, fn in enumerate(layouts)}
    timings = interleaved({"step": torch.enable_grad()(step)} | fns, seconds)
    best = {name: 1e3 * min(timings[name, i].p50 for i in range(len(made[name][1]))) for name in made}
    return timings["step"], sum(made[name][0] * ms for name, ms in best.items()), best


@contextlib.contextmanager
def replaced(make):
    """The kernels of `modulated_linear` as make(name, kernel) returns them, meanwhile."""
    core = cpu.load()
    kernels = {name: getattr(core, name) for name in ("modulated_forward", "modulated_backward")}
    try:
        for name, kernel in kernels.items():
            setattr(core, name, make(name, kernel))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(core, name, kernel)


@contextlib.contextmanager
def clocked():
    """A list of the seconds that each call of a kernel takes meanwhile."""
    took = []

    def timed(_, kernel):
        def call(*args):
            began = time.perf_counter()
            made = kernel(*args)
            took.append(time.perf_counter() - began)
            return made

        return call

    with replaced(timed):
        yield took


def kernels(step, seconds):
    """Median ms of the kernels of a step, steps one after another."""
    samples, end = [], time.perf_counter() + seconds
    with clocked() as took:
        while len(samples) < 5 or time.perf_counter() < end:
            took.clear()
            step()
            samples.append(sum(took))
    return 1e3 * sorted(samples)[len(samples) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    peaks = ceilings(dtype)
    for case in BENCH_CASES:
        # bmm takes as many rows of each context
        if case.id == "debug" or case.per_token or case.lengths is not None:
            continue
        inputs = make_inputs(case, dtype, dtype)
        step, ms, each = library(calls(inputs, True)["ctxkern"], case, dtype, args.seconds)
        (row,) = rows_of(case, inputs, True, {"ctxkern": step}, {"ctxkern": 0}, peaks)
        floor, ours = float(row["floor_ms"]), float(row["p50_ms"])
        in_cache = dataclasses.replace(inputs, bilinear=inputs.bilinear[:1].contiguous().expand_as(inputs.bilinear))
        alone, cached = (kernels(calls(given, True)["ctxkern"], args.seconds / 2) for given in (inputs, in_cache))
        print(
            f"{case.id:12} products {ms:7.2f} ms, {floor / ms:.2f} of the floor; the step {ours:7.2f}, "
            f"{floor / ours:.2f}; its kernels {alone:7.2f}, {floor / alone:.2f}; with bilinear in cache {cached:7.2f}, "
            f"{floor / cached:.2f}; step ÷ products {ours / ms:.2f};",
            *(f"{name} {value:.2f}" for name, value in each.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()

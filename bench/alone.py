"""What a training step of `modulated_linear` could reach if its two threads never waited, for each other or for memory.

    python bench/alone.py bfloat16      # float32

Half of what its kernels take on one thread, as the case is and with one row of `bilinear`, which stays in the cache,
for all rows of D; and around them what an autograd.Function takes that does nothing but call the same kernels with
arguments made before. In turn with a large torch.mm on two threads, whose rate makes the floor, as in the bench table;
and with the step itself on two threads after the other forms, as it is there.
No schedule and no Python does better with the same tiles, but for noise: on a shared machine limits of two runs differ
by 0.05 and more, and a step that is at its limit may be seen above it.
"""

import argparse
import dataclasses
import time
from statistics import median

import torch
from products import clocked, replaced

from ctxkern.runtime import cpu
from ctxkern.testing.cases import BENCH_CASES, make_inputs
from ctxkern.testing.measure import Ceilings, Timing, ceilings, large_product, times
from ctxkern.testing.peers import calls
from ctxkern.testing.report import rows_of

THREADS = 2


def bare(inputs):
    """A step of the kernels that `modulated_linear` calls, in an autograd.Function of nothing else."""
    core, given = cpu.load(), {}

    def recorded(name, kernel):
        def call(*args):
            given[name] = args
            return kernel(*args)

        return call

    with replaced(recorded):
        calls(inputs, True)["ctxkern"]()

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands):
            ctx.save_for_backward(*operands)
            (y,) = core.modulated_forward(*given["modulated_forward"])
            return y

        @staticmethod
        def backward(ctx, dy):
            # what a backward that reads its operands has to do
            assert ctx.saved_tensors
            dx, dcontext, *lists = core.modulated_backward([dy], *given["modulated_backward"][1:])
            return dx, dcontext, *(gradient for (gradient,) in lists)

    operands, _ = inputs.leaves().arguments()
    needed = [operand for operand in operands if operand is not None]

    def step():
        y = Bare.apply(*operands)
        return y, torch.autograd.grad(y, needed, inputs.dy)

    return step


def measured(inputs, product, seconds):
    """Medians, in seconds, of the product, the kernels on one thread, the same with `bilinear` in cache, what a bare
    autograd.Function takes around kernels, and a step on two threads after the other forms."""
    in_cache = dataclasses.replace(inputs, bilinear=inputs.bilinear[:1].contiguous().expand_as(inputs.bilinear))
    others = calls(inputs, True)
    around, whole, cached = bare(inputs), others.pop("ctxkern"), calls(in_cache, True)["ctxkern"]
    samples, end = [], time.perf_counter() + seconds
    with clocked() as took:

        def kernels(step):
            # once for its memory and caches, once for the clock
            for _ in range(2):
                took.clear()
                step()
            return sum(took)

        while len(samples) < 5 or time.perf_counter() < end:
            torch.set_num_threads(THREADS)
            (of_product,) = times(product, runs=1)
            took.clear()
            began = time.perf_counter()
            around()
            rest = time.perf_counter() - began - sum(took)
            for form in others.values():
                form()
            began = time.perf_counter()
            whole()
            between = time.perf_counter() - began
            torch.set_num_threads(1)
            samples.append((of_product, kernels(whole), kernels(cached), rest, between))
    torch.set_num_threads(THREADS)
    return [median(column) for column in zip(*samples, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=10, help="for each case")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    dtype = getattr(torch, args.dtype)
    product, flops = large_product(dtype)
    bandwidth = ceilings(dtype).bandwidth
    for case in BENCH_CASES:
        if case.id == "debug":
            continue
        inputs = make_inputs(case, dtype, dtype)
        of_product, kernels, cached, rest, between = measured(inputs, product, args.seconds)
        peaks = Ceilings(flops / of_product, bandwidth)
        timings = {"ctxkern": Timing(kernels, kernels, kernels, 1)}
        (row,) = rows_of(case, inputs, True, timings, {"ctxkern": 0}, peaks)
        floor = float(row["floor_ms"])
        alone, near, around = 500 * kernels, 500 * cached, 1000 * rest
        print(
            f"{case.id:18} {args.dtype:9} floor {floor:6.2f} ms; half of one thread's kernels {alone:6.2f}, with "
            f"bilinear in cache {near:6.2f}; around them {around:.2f}; at most {floor / (alone + around):.2f} of the "
            f"floor, {floor / (near + around):.2f} with bilinear in cache; a step after other forms "
            f"{1000 * between:.2f}, {floor / (1000 * between):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What bench/gpu.py times: every case with its peers, in CUDA graphs."""

import functools
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

import ctxkern
from ctxkern.testing import cases, report
from ctxkern.testing.cases import BENCH_CASES, Case, make_inputs
from ctxkern.testing.measure import captured, ceilings, interleaved, peak_extra_bytes
from ctxkern.testing.oracle import check
from ctxkern.testing.peers import calls, three_projections

# of x and of the parameters
DTYPES = {name: cases.DTYPES[name] for name in ("bf16", "bf16-f32-params", "f32")}
# the cases that the bars are set for, then the table of all benchmarks
TIMED = [
    Case("price", 16, 2048, 2048, 2048, 32),
    Case("projection", 32, 512, 1024, 1024, 64),
    Case("projection-qkv", 32, 512, 1024, 3072, 64),
    Case("decode-wide", 64, 1, 2048, 2048, 32),
    Case("step", 16, 128, 256, 256, 32),
    *BENCH_CASES,
]
TINY = [Case("tiny-qkv", 2, 8, 16, 48, 4)]
# bytes of inputs that are gone through before the first comes again, more than the caches hold, and copies at most
ROTATED, COPIES = 256 << 20, 64


class Run:
    """What is asked for, and the file that rows go to."""

    def __init__(self, args):
        self.args, self.device, backends = args, args.device, args.backends
        self.cases = [c for c in (TINY if args.rehearse else TIMED) if args.cases is None or c.id in args.cases]
        self.others = ["cuda"] if "cuda" in backends and "triton" in backends and self.device == "cuda" else []
        path = args.csv or report.results_file(self.device, Path(__file__).parent / "results")
        self.path, self.rows = None if args.rehearse else path, []

    def peaks(self, dtype):
        peaks = ceilings(dtype, self.device, 256 if self.args.rehearse else None)
        print(f"{dtype}: {peaks.flops / 1e12:.1f} TFLOP/s, {peaks.bandwidth / 1e9:.0f} GB/s", flush=True)
        return peaks

    def write(self, rows):
        self.rows += rows
        print(report.table(rows), flush=True)
        if self.path:
            report.append(rows, self.path)

    def inputs(self, case, dtype, param_dtype):
        """As many copies as are gone through."""
        first = make_inputs(case, dtype, param_dtype, self.device)
        each = sum(t.numel() * t.element_size() for t in first.arguments()[0] if t is not None)
        copies = 1 if self.args.rehearse else max(1, min(COPIES, -(-ROTATED // max(each, 1))))
        return [first, *(make_inputs(case, dtype, param_dtype, self.device, seed) for seed in range(1, copies))]

    def timed(self, case, each, first, backward, peaks):
        """Rows of the callables of each copy of the inputs, {name: callable} one a copy."""
        fns = {}
        for name in each[0]:
            # torch reads the bounds of packed sequences to the host for an einsum, which no graph can hold
            eager = self.device == "cpu" or name == "einsum" and case.lengths is not None
            all_of = functools.partial(_all_of, [one[name] for one in each])
            try:
                fns[name] = all_of if eager else captured(all_of)[0]
            except Exception as error:
                print(f"{case.id} {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        timings = interleaved(fns, self.args.seconds, device=self.device)
        memory = {name: peak_extra_bytes(each[0][name], self.device) for name in fns}
        return report.rows_of(case, first, backward, _scaled(timings, len(each)), memory, peaks)


def _all_of(fns):
    for fn in fns:
        fn()


def _scaled(timings, copies):
    return {n: replace(t, p20=t.p20 / copies, p50=t.p50 / copies, p80=t.p80 / copies) for n, t in timings.items()}


def ours(run, case, inputs, backward):
    """{name: callable} of ctxkern's own: as planned, the other backend, Q, K and V in one call."""
    made = calls(inputs, backward, backends=run.others)
    made = {name: fn for name, fn in made.items() if name.startswith("ctxkern")}
    if case.id.endswith("qkv"):
        made["ctxkern QKV"] = three_projections(inputs, backward)
        for name in run.others:
            made[f"ctxkern QKV {name}"] = three_projections(inputs, backward, name)
    return made


def dealt(args, items):
    """Those of this process; neighbours, which compile alike, go to different ones."""
    return list(items)[args.part :: args.processes]


def stage_compile(args):
    """Every call that is timed, once, without its peers."""
    run = Run(args)
    for case, dtype, backward in dealt(args, itertools.product(run.cases, args.dtypes, (False, True))):
        inputs = make_inputs(case, *DTYPES[dtype], args.device)
        for fn in ours(run, case, inputs, backward).values():
            fn()
            wait(args.device)


def stage_time(args):
    run = Run(args)
    for dtype, param_dtype in (DTYPES[name] for name in args.dtypes):
        peaks = run.peaks(dtype)
        for case in run.cases:
            try:
                inputs = run.inputs(case, dtype, param_dtype)
                if case.tokens * case.D * case.E < (1e12 if args.device == "cuda" else 1e11):
                    check(ctxkern.modulated_linear, inputs[0], case.id)
                for backward in (False, True):
                    each = [calls(one, backward, args.compiled) | ours(run, case, one, backward) for one in inputs]
                    run.write(run.timed(case, each, inputs[0], backward, peaks))
            except Exception as error:
                print(f"{case.id}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    print("\n".join(report.means(run.rows)))


def stage_overhead(args):
    """Seconds until eager calls are issued, and until they are done."""
    device, case = args.device, TINY[0] if args.rehearse else Case("step", 16, 128, 256, 256, 32)
    for backward in (False, True):
        made = calls(make_inputs(case, torch.float32 if args.rehearse else torch.bfloat16, device=device), backward)
        for name, fn in made.items():
            for _round in range(3):
                fn()
            wait(device)
            started, times = time.perf_counter(), 100
            for _round in range(times):
                fn()
            issued = time.perf_counter() - started
            wait(device)
            done = time.perf_counter() - started
            each = f"{issued / times * 1e6:8.1f} µs to issue, {done / times * 1e6:8.1f} µs in all"
            print(f"{'fwd+bwd' if backward else 'fwd':8} {name:20} {each}")


def wait(device):
    """For what was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


STAGES = {"compile": stage_compile, "time": stage_time, "overhead": stage_overhead}

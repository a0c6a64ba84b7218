"""Everything that only a GPU can tell, in one command: python bench/gpu.py

  about     versions, the GPU and its clocks
  check     the case table in every dtype and form against float64, small workspaces, Q, K and V in one call, bits of a
            second run
  one       the panel form's forward as one persistent launch: case table, bits of 20 runs
  graphs    calls captured in a CUDA graph, replayed with other contexts per sequence
  compile   what the next stages launch, so that they need not
  time      graph replays over rotated inputs beside the peers: a row each in bench/results/<GPU>.csv
  sanitize  compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over a few small calls, where it is installed
  overhead  eager calls at d = 256, where Python and launches are what there is to pay

Each stage is a process of its own with a limit of its own, as an assertion on the device ends the one it happens in,
and a kernel that waits for ever would end all. Odd sizes are compiled for one by one, some 3,000 kernels in `check`:
it, `one` and `compile` are shared by as many processes as there are cores (--processes). Rows are written case by case.
--stages picks some, --dtypes and --cases of `time`; --compiled adds torch.compile of the peers, --rehearse runs all of
it on the CPU in Triton's interpreter, at sizes of no interest. bench/tune.py finds the tiles.
"""

import argparse
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int("--rehearse" in sys.argv))

import torch

import ctxkern
from ctxkern import planner
from ctxkern.reference import modulated_qkv_ref
from ctxkern.testing import report
from ctxkern.testing.cases import BENCH_CASES, CASES, DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.measure import captured, ceilings, interleaved, peak_extra_bytes, provenance
from ctxkern.testing.oracle import check, check_family, differentiate, run
from ctxkern.testing.peers import calls, three_projections

# seconds that each may take
STAGES = {"about": 60, "check": 590, "one": 300, "graphs": 180, "compile": 300, "time": 590, "sanitize": 590}
STAGES |= {"overhead": 120}
# what is dealt out to several processes
SHARED = ("check", "one", "compile")


# dtypes of x and of the parameters that times are taken in
MEASURED = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
    "f32": (torch.float32, torch.float32),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="*", choices=(*STAGES, "small"), default=list(STAGES))
    parser.add_argument("--dtypes", nargs="*", choices=MEASURED, default=list(MEASURED), help="of `time`")
    parser.add_argument("--cases", nargs="*", default=None, help="of `time`, by name (default: all)")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="of a stage, at most")
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the peers too")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small: does the script itself run?")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for all peers of a case (default: 1)")
    parser.add_argument("--csv", default=None, help="append rows here (default: bench/results/<GPU>.csv)")
    parser.add_argument("--here", action="store_true", help="in this process, not one a stage")
    return parser.parse_args()


ARGS = arguments()
DEVICE = "cpu" if ARGS.rehearse else "cuda"

# rows a context up to which the outer form runs, and whether panel takes one launch
FORMS = {"panel": (-1, False), "outer": (1 << 30, False), "one launch": (-1, True)}
PAIRS = list(DTYPES.values())
# sizes that fill tiles, beside the case table's; more contexts than a group holds
FULL = [
    Case("full", 8, 256, 512, 384, 64, bias=True),
    Case("full-shared", 16, 96, 256, 512, 48, rows=5, index=tuple(i * 7 % 5 for i in range(16))),
    Case("full-odd", 7, 133, 385, 391, 47, bias=True),
    Case("full-wide-k", 4, 64, 128, 256, 512),
    Case("full-ragged", 6, 0, 320, 256, 32, lengths=(1, 300, 0, 77, 128, 513)),
    Case("full-token", 4, 64, 192, 256, 64, per_token=True),
]
# of which Q, K and V are checked in one call too
IN_THREES = ("odd", "shared-uneven", "ragged-shared", "decode", "context-per-token", "full", "full-shared", "full-odd")
# the cases that the bars are set for, then the table of all benchmarks
TIMED = [
    Case("price", 16, 2048, 2048, 2048, 32),
    Case("projection", 32, 512, 1024, 1024, 64),
    Case("projection-qkv", 32, 512, 1024, 3072, 64),
    Case("decode-wide", 64, 1, 2048, 2048, 32),
    Case("step", 16, 128, 256, 256, 32),
    *BENCH_CASES,
]
if ARGS.rehearse:
    PAIRS, FULL = PAIRS[:1], []
    CASES = [case for case in CASES if case.id in ("tiny", "shared-uneven", "context-per-token")]
    TIMED = [Case("tiny-qkv", 2, 8, 16, 48, 4)]


def use(form):
    """Calls of Triton kernels take this form from now on; None: the planner's choice."""
    planner.GPU_OUTER_ROWS, planner.GPU_PERSISTENT = FORMS.get(form, PLANNED)


PLANNED = planner.GPU_OUTER_ROWS, planner.GPU_PERSISTENT
BACKENDS = [name for name in ("triton", "cuda") if ctxkern.backends()[name]]


def stage_about():
    for name, value in provenance(DEVICE).items():
        print(f"{name}: {value}")
    print(*(f"{name}: {status}" for name, status in ctxkern.backends().items()), sep="\n")
    print(f"capability: {torch.cuda.get_device_capability() if DEVICE == 'cuda' else None}")
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], check=False)


def dealt(items):
    """Those of this process; neighbours, which compile alike, go to different ones."""
    return list(items)[ARGS.part :: ARGS.processes]


def stage_check():
    """Prints what is wrong; raises at the end."""
    calls_ = [
        (checked, backend, form, case, pair, workspace)
        for form, backend, case, pair in itertools.product(("panel", "outer"), BACKENDS, [*CASES, *FULL], PAIRS)
        for checked, workspace in ((check_one, None), (check_one, 1 << 14), (check_three, None))
        if not (case.per_token and form == "panel") and (checked is check_one or case.id in IN_THREES)
    ]
    wrong, count = [], 0
    for checked, backend, form, case, pair, workspace in dealt(calls_):
        use(form)
        label = f"{checked.__name__} {backend} {form} {case.id} {pair} workspace {workspace}"
        count += 1
        try:
            checked(case, *pair, label, backend=backend, workspace_bytes=workspace)
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(wrong[-1], flush=True)
            wait()
    print(f"{count} calls, {len(wrong)} wrong", flush=True)
    assert not wrong


def check_one(case, dtype, param_dtype, label, **options):
    fn = functools.partial(ctxkern.modulated_linear, **options)
    inputs = make_inputs(case, dtype, param_dtype, DEVICE)
    check(fn, inputs, label)
    same_bits(label, run(fn, inputs), run(fn, inputs))


def check_three(case, dtype, param_dtype, label, **options):
    """Q, K and V in one call, of different widths."""
    fn = by_projection(functools.partial(ctxkern.modulated_qkv, **options))
    widths = [case.E, case.E // 2 + 1, 1]
    arguments, douts = qkv_arguments(case, dtype, param_dtype, widths, device=DEVICE)
    check_family(fn, by_projection(modulated_qkv_ref), arguments, douts, label)
    same_bits(label, *(differentiate(fn, arguments, douts) for _ in range(2)))


def same_bits(label, first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{label}: {name} has other bits the second time"


def stage_graphs():
    if DEVICE == "cpu":
        return print("no graphs on the CPU")
    case = Case("graph", 8, 64, 128, 96, 32, rows=6, index=(0, 1, 2, 3, 4, 5, 0, 1))
    for form, backend in itertools.product(("panel", "outer"), BACKENDS):
        use(form)
        inputs = make_inputs(case, torch.bfloat16, device=DEVICE).leaves()
        positional, keyword = inputs.arguments()
        fn = functools.partial(ctxkern.modulated_linear, *positional, backend=backend, **keyword)

        def step(fn=fn, inputs=inputs, positional=positional):
            y = fn()
            return y, *torch.autograd.grad(y, [t for t in positional if t is not None], inputs.dy)

        replay, results = captured(step)
        for index in ((5, 5, 5, 5, 0, 0, 3, 3), (1, 0, 1, 0, 1, 0, 1, 0), (0, 1, 2, 3, 4, 5, 0, 2)):
            inputs.context_index.copy_(torch.tensor(index))
            replay()
            torch.cuda.synchronize()
            for got, want in zip(results, step(), strict=True):
                assert torch.equal(got, want), f"a replay differs with context_index {index}"
    print("replays agree with eager calls, bit for bit")
    return None


def stage_one():
    """A stage of its own, as what waits for ever would take others along."""
    use("one launch")
    cases = [case for case in [*CASES, *FULL] if not case.per_token]
    for case, (dtype, param_dtype), workspace in dealt(itertools.product(cases, PAIRS, (None, 1 << 18))):
        inputs = make_inputs(case, dtype, param_dtype, DEVICE)
        fn = functools.partial(ctxkern.modulated_linear, backend="triton", workspace_bytes=workspace)
        check(fn, inputs, f"one launch {case.id} {dtype} {param_dtype} workspace {workspace}")
        positional, keyword = inputs.arguments()
        y = fn(*positional, **keyword)
        for _ in range(2 if ARGS.rehearse else 20):
            assert torch.equal(fn(*positional, **keyword), y), f"{case.id}: other bits"
    print("the case table is right, bits are those of the first run")


def stage_compile():
    """Every call that is timed, once, without its peers."""
    every = itertools.product(timed_cases(), ARGS.dtypes, (False, True))
    for case, dtype, backward in dealt(every):
        inputs = make_inputs(case, *MEASURED[dtype], DEVICE)
        for name, fn in ours(case, inputs, backward).items():
            print(f"{case.id} {dtype} {name}", flush=True)
            fn()
            wait()


def stage_small():
    """What the sanitizer runs: each kernel once or twice."""
    for form, backend in itertools.product(("panel", "outer"), BACKENDS):
        use(form)
        for case in CASES:
            if case.id in ("odd", "shared-uneven", "ragged-shared", "wide-k", "context-per-token"):
                for dtype, param_dtype in PAIRS:
                    run(
                        functools.partial(ctxkern.modulated_linear, backend=backend),
                        make_inputs(case, dtype, param_dtype, DEVICE),
                    )
    print("ran")


def stage_sanitize():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return print("compute-sanitizer is not installed")
    command, failed = [sys.executable, __file__, "--here", "--stages", "small"], []
    for check_name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        done = subprocess.run(
            [tool, "--tool", check_name, "--error-exitcode", "9", *command], capture_output=True, text=True, check=False
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        print(check_name, "status", done.returncode, *lines[-40 if done.returncode else -3 :], sep="\n  ", flush=True)
        failed += [check_name] * bool(done.returncode)
    assert not failed, failed
    return None


# bytes of inputs that are gone through before the first comes again: more than the caches hold
ROTATED = 256 << 20


def timed_cases():
    return [case for case in TIMED if ARGS.cases is None or case.id in ARGS.cases]


def stage_time():
    rows = []
    path = ARGS.csv or report.results_file(DEVICE, Path(__file__).parent / "results")
    for dtype, param_dtype in (MEASURED[name] for name in ARGS.dtypes):
        peaks = ceilings(dtype, DEVICE, 256 if ARGS.rehearse else None)
        print(f"{dtype}: {peaks.flops / 1e12:.1f} TFLOP/s, {peaks.bandwidth / 1e9:.0f} GB/s", flush=True)
        for case in timed_cases():
            try:
                for made in timed_rows(case, dtype, param_dtype, peaks):
                    rows += made
                    print(report.table(made), flush=True)
                    if path and not ARGS.rehearse:
                        report.append(made, path)
            except Exception as error:
                print(f"{case.id}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    print("\n".join(report.means(rows)))
    if path and not ARGS.rehearse:
        print(f"{len(rows)} rows appended to {path}")


def ours(case, inputs, backward):
    """{name: callable} of ctxkern's own: as planned, the other backend, one launch, Q, K and V in one call."""
    beside = ["cuda"] if "cuda" in BACKENDS and DEVICE == "cuda" else []
    made = {name: fn for name, fn in calls(inputs, backward, backends=beside).items() if name.startswith("ctxkern")}
    if case.S > 1 and not backward and "triton" in BACKENDS:
        made["ctxkern one launch"] = in_form("one launch", made["ctxkern"])
    if case.id.endswith("qkv"):
        made["ctxkern QKV"] = three_projections(inputs, backward)
        for name in beside:
            made[f"ctxkern QKV {name}"] = three_projections(inputs, backward, name)
    return made


def in_form(form, fn):
    def call():
        use(form)
        try:
            return fn()
        finally:
            use(None)

    return call


def timed_rows(case, dtype, param_dtype, peaks):
    """The rows of forward, then those of forward and backward."""
    first = make_inputs(case, dtype, param_dtype, DEVICE)
    bytes_each = sum(t.numel() * t.element_size() for t in first.arguments()[0] if t is not None)
    copies = 1 if ARGS.rehearse else max(1, min(8, -(-ROTATED // max(bytes_each, 1))))
    inputs = [first, *(make_inputs(case, dtype, param_dtype, DEVICE, seed) for seed in range(1, copies))]
    if case.tokens * case.D * case.E < 1e11:
        check(ctxkern.modulated_linear, first, case.id)
    for backward in (False, True):
        each = [calls(one, backward, ARGS.compiled) | ours(case, one, backward) for one in inputs]
        fns = {}
        for name in each[0]:

            def all_of(name=name, each=each):
                for one in each:
                    one[name]()

            try:
                fns[name] = all_of if DEVICE == "cpu" else captured(all_of)[0]
            except torch.cuda.OutOfMemoryError:
                print(f"{case.id}: no memory for {name}", flush=True)
        timings = interleaved(fns, ARGS.seconds, device=DEVICE)
        memory = {name: peak_extra_bytes(each[0][name], DEVICE) for name in fns}
        yield report.rows_of(case, first, backward, scaled(timings, copies), memory, peaks)


def scaled(timings, copies):
    return {n: replace(t, p20=t.p20 / copies, p50=t.p50 / copies, p80=t.p80 / copies) for n, t in timings.items()}


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def stage_overhead():
    case = TIMED[0] if ARGS.rehearse else Case("step", 16, 128, 256, 256, 32)
    for backward in (False, True):
        made = calls(make_inputs(case, torch.float32 if ARGS.rehearse else torch.bfloat16, device=DEVICE), backward)
        for name, fn in made.items():
            for _ in range(3):
                fn()
            wait()
            started, times = time.perf_counter(), 100
            for _ in range(times):
                fn()
            issued = time.perf_counter() - started
            wait()
            done = time.perf_counter() - started
            each = f"{issued / times * 1e6:8.1f} µs to issue, {done / times * 1e6:8.1f} µs in all"
            print(f"{'fwd+bwd' if backward else 'fwd':8} {name:20} {each}")


def finished(stage, given):
    """Runs a stage in processes of its own; returns what was wrong, or ""."""
    count = ARGS.processes if stage in SHARED else 1
    command = [sys.executable, __file__, "--here", "--stages", stage, "--processes", str(count), *given]
    running = [subprocess.Popen([*command, "--part", str(part)]) for part in range(count)]
    until = time.monotonic() + STAGES[stage]
    try:
        statuses = [process.wait(max(0.1, until - time.monotonic())) for process in running]
    except subprocess.TimeoutExpired:
        return f"stopped after {STAGES[stage]} s"
    finally:
        for process in running:
            process.kill()
    return "failed" if any(statuses) else ""


def main():
    if ARGS.here:
        for stage in ARGS.stages:
            globals()[f"stage_{stage}"]()
        return
    failed = []
    given = ["--seconds", str(ARGS.seconds), "--dtypes", *ARGS.dtypes, *(["--csv", ARGS.csv] if ARGS.csv else [])]
    given += ["--cases", *ARGS.cases] if ARGS.cases is not None else []
    given += [flag for flag in ("--compiled", "--rehearse") if getattr(ARGS, flag[2:])]
    for stage in ARGS.stages:
        print(f"== {stage}", flush=True)
        started = time.perf_counter()
        wrong = finished(stage, given)
        failed += [stage] * bool(wrong)
        print(f"== {stage}: {wrong or 'done'} in {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

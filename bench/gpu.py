"""Everything that only a GPU can tell, in one command: python bench/gpu.py

  about     versions, the GPU and its clocks
  check     the case table in every dtype and form against float64, small workspaces, Q, K and V in one call, bits of a
            second run
  one       the panel form's forward as one persistent launch: case table, bits of 20 runs
  graphs    calls captured in a CUDA graph, replayed with other contexts per sequence
  compile   what the next stage launches, so that it need not
  time      graph replays over rotated inputs beside the peers: a row each in bench/results/<GPU>.csv
  forms     the panel form's forward in one launch beside two, rows too
  overhead  eager calls at d = 256, where Python and launches are what there is to pay
  sanitize  compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over a few small calls, where it is installed

Each stage is a process of its own with a limit of its own, as an assertion on the device ends the one it happens in,
and a kernel that waits for ever would end all. Odd sizes are compiled for one by one, some 3,000 kernels in `check`:
it, `one` and `compile` are shared by as many processes as there are cores (--processes). Rows are written case by case.
--stages picks some, --dtypes and --cases what is timed (gpu_time.py); --compiled adds torch.compile of the peers,
--rehearse runs all of it on the CPU in Triton's interpreter, at sizes of no interest. bench/tune.py finds the tiles.
The CUDA kernels are built before, here by `CTXKERN_CUDA_ARCHS=90 python setup.py build_ext --inplace`.
"""

import argparse
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int("--rehearse" in sys.argv))

import gpu_time
import torch

import ctxkern
from ctxkern import plan as planner
from ctxkern.reference import modulated_qkv_ref
from ctxkern.testing.cases import CASES, DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.measure import captured, provenance
from ctxkern.testing.oracle import check, check_family, differentiate, run

# seconds that each may take
STAGES = {"about": 60, "check": 590, "one": 300, "graphs": 180, "compile": 300, "time": 590, "forms": 180}
STAGES |= {"overhead": 120, "sanitize": 590}
# what is dealt out to several processes
SHARED = ("check", "one", "compile")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="*", choices=(*STAGES, "small"), default=list(STAGES), help="(default: all)")
    parser.add_argument("--dtypes", nargs="*", choices=gpu_time.DTYPES, default=list(gpu_time.DTYPES), help="timed")
    parser.add_argument("--cases", nargs="*", default=None, help="timed, by name (default: all)")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="of a stage, at most")
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
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
# bytes of a workspace that makes several strips and groups of a case of the table, and of one of these
TIGHT = (1 << 14, 1 << 18)
# of which Q, K and V are checked in one call too
IN_THREES = ("odd", "shared-uneven", "ragged-shared", "decode", "context-per-token", "full", "full-shared", "full-odd")
if ARGS.rehearse:
    PAIRS, FULL = PAIRS[:1], []
    CASES = [case for case in CASES if case.id in ("tiny", "shared-uneven", "context-per-token")]


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
    every = [
        (checked, backend, form, case, pair, workspace)
        for backend, form, case, pair in itertools.product(BACKENDS, ("panel", "outer"), [*CASES, *FULL], PAIRS)
        for checked, workspace in (
            (check_one, None),
            (check_one, 1 << (18 if case in FULL else 14)),
            (check_three, None),
        )
        if not (case.per_token and form == "panel") and (checked is check_one or case.id in IN_THREES)
    ]
    mine, wrong = dealt(every), 0
    for at, (checked, backend, form, case, pair, workspace) in list(enumerate(mine))[ARGS.begin :]:
        use(form)
        label = f"{checked.__name__} {backend} {form} {case.id} {pair} workspace {workspace}"
        try:
            checked(case, *pair, label, backend=backend, workspace_bytes=workspace)
        except Exception as error:
            wrong += 1
            print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            if not alive():
                go_on(at + 1)
    print(f"{len(mine) - ARGS.begin} calls, {wrong} wrong", flush=True)
    assert not wrong
    assert not ARGS.begin, "begun anew"


def alive():
    """Whether the device still works after an error."""
    try:
        gpu_time.wait(DEVICE)
    except Exception:
        return False
    return True


def go_on(begin):
    """This process anew, from a later call on, as the device is lost to it."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv, "--begin", str(begin)])


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
    # what torch's allocator keeps would hide accesses beyond a tensor
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check_name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        done = subprocess.run(
            [tool, "--tool", check_name, "--error-exitcode", "9", *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        print(check_name, "status", done.returncode, *lines[-40 if done.returncode else -3 :], sep="\n  ", flush=True)
        failed += [check_name] * bool(done.returncode)
    assert not failed, failed
    return None


def finished(stage, given):
    """Runs a stage in processes of its own; returns what was wrong, or ""."""
    count = ARGS.processes if stage in SHARED else 1
    command = [sys.executable, __file__, "--here", "--stages", stage, "--processes", str(count), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if count > 1 else None
    running = [
        subprocess.Popen([*command, "--part", str(part)], env=environment, start_new_session=True)
        for part in range(count)
    ]
    until = time.monotonic() + STAGES[stage]
    try:
        statuses = [process.wait(max(0.1, until - time.monotonic())) for process in running]
    except subprocess.TimeoutExpired:
        return f"stopped after {STAGES[stage]} s"
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return "failed" if any(statuses) else ""


def main():
    if ARGS.here:
        for stage in ARGS.stages:
            if stage in gpu_time.STAGES:
                gpu_time.STAGES[stage](ARGS, DEVICE, BACKENDS, dealt)
            else:
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

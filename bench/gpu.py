"""Everything that only a GPU can tell, in one command: python bench/gpu.py

  about      versions, the GPU and its clocks
  right      the default path on a dozen cases against float64, forward and gradients
  products   what the library reaches at the sizes that the panel form asks for (gpu_probe.py, as the next ones)
  kernels    each kernel of a call by itself: launches, ms, rates
  compile    what the next stage launches, so that it need not
  time       graph replays over rotated inputs, with the peers: a row each in bench/results/<GPU>.csv
  graphs     calls captured in a CUDA graph, replayed with other contexts per sequence
  workspace  whole calls with workspaces of several sizes
  overlap    the weights of a strip while another is projected
  tiles      the largest products with larger tiles
  overhead   eager calls at d = 256, where Python and launches are what there is to pay
  check      the case table in every dtype and form against float64, small workspaces, Q, K and V in one call, bits of a
             second run
  sanitize   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over a few small calls, where it is installed

The most important come first. Each stage has its own process and time limit, as an assertion on the device ends the
process it happens in, and a kernel that waits for ever would end all. Odd sizes are compiled for one by one, some 3,000
kernels in `check`: it and `compile` are shared by as many processes as there are cores (--processes). Lines are printed
and rows written case by case, so that what is stopped keeps what it has found.

    python bench/gpu.py --limit 540                        at most so many seconds in all
    python bench/gpu.py --stages about right kernels       some stages
    python bench/gpu.py --stages time --cases price --dtypes bf16
    python bench/gpu.py --stages check --checked odd decode --pairs f16 --forms outer --backends triton
    python bench/gpu.py --rehearse                         all of it on the CPU, at sizes of no interest

A bare tree is enough; the CUDA kernels are built before, here by `CTXKERN_CUDA_ARCHS=90 python setup.py build_ext
--inplace`. bench/tune.py finds the tiles.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_probe
import gpu_time
import torch
from gpu_time import dealt

import ctxkern
from ctxkern.reference import modulated_qkv_ref
from ctxkern.testing import force
from ctxkern.testing.cases import CASES, DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.measure import captured, provenance
from ctxkern.testing.oracle import check, check_family, differentiate, run

# seconds that each may take
LIMITS = {"about": 60, "right": 180, "products": 60, "kernels": 180, "compile": 300, "time": 590, "graphs": 180}
LIMITS |= {"workspace": 120, "overlap": 60, "tiles": 300, "overhead": 120, "check": 590, "sanitize": 590}
# what is dealt out to several processes
SHARED = ("right", "compile", "check")
FORMS = ("planned", "panel", "outer")
# sizes that fill tiles, in addition to the case table's; more contexts than a group holds
FULL = [
    Case("full", 8, 256, 512, 384, 64, bias=True),
    Case("full-shared", 16, 96, 256, 512, 48, rows=5, index=tuple(i * 7 % 5 for i in range(16))),
    Case("full-odd", 7, 133, 385, 391, 47, bias=True),
    Case("full-wide-k", 4, 64, 128, 256, 512),
    Case("full-ragged", 6, 0, 320, 256, 32, lengths=(1, 300, 0, 77, 128, 513)),
    Case("full-token", 4, 64, 192, 256, 64, per_token=True),
]
ALL = {case.id: case for case in (*CASES, *FULL)}
DOZEN = ("tiny", "odd", "debug", "shared-uneven", "wide-k", "decode", "context-per-token", "ragged-shared")
DOZEN += ("permuted-bilinear", "empty-batch", "full", "full-shared")
# of which Q, K and V are checked in one call too
IN_THREES = ("odd", "shared-uneven", "ragged-shared", "decode", "context-per-token", "full", "full-shared", "full-odd")
SMALL = ("odd", "shared-uneven", "ragged-shared", "wide-k", "context-per-token")
REHEARSED = ("tiny", "shared-uneven", "context-per-token")


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="*", choices=(*STAGES, "small"), default=list(LIMITS), help="(default: all)")
    parser.add_argument("--limit", type=int, default=None, help="seconds for all stages together")
    parser.add_argument("--dtypes", nargs="*", choices=gpu_time.DTYPES, default=list(gpu_time.DTYPES), help="timed")
    parser.add_argument("--cases", nargs="*", default=None, help="timed, by name (default: all)")
    parser.add_argument("--checked", nargs="*", choices=ALL, default=list(ALL), help="cases of `check`")
    parser.add_argument("--pairs", nargs="*", choices=DTYPES, default=list(DTYPES), help="dtypes of `check`, `right`")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=["panel", "outer"], help="of `check`")
    parser.add_argument("--backends", nargs="*", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="of a stage, at most")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the peers too")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small: does the script itself run?")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for all peers of a case (default: 1)")
    parser.add_argument("--csv", default=None, help="append rows here (default: bench/results/<GPU>.csv)")
    parser.add_argument("--here", action="store_true", help="all stages in this process")
    for name, default in (("part", 0), ("begin", 0), ("lives", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.rehearse else "cuda"
    args.cores = args.processes
    if args.rehearse:
        args.checked, args.pairs = [name for name in args.checked if name in REHEARSED], args.pairs[:1]
    return args


def stage_about(args):
    for name, value in provenance(args.device).items():
        print(f"{name}: {value}")
    print(*(f"{name}: {status}" for name, status in ctxkern.backends().items()), sep="\n")
    print(f"capability: {torch.cuda.get_device_capability() if args.device == 'cuda' else None}")
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], check=False)


def forced(form):
    return force(strategy=None if form == "planned" else form)


def stage_right(args):
    """What a caller who asks for nothing gets."""
    names = [name for name in DOZEN if not args.rehearse or name in REHEARSED]
    _checked(
        args, [(check_one, None, "planned", ALL[name], DTYPES[pair], None) for name in names for pair in args.pairs]
    )


def stage_check(args):
    every = [
        (checked, backend, form, ALL[name], DTYPES[pair], workspace)
        for backend, form, name, pair in itertools.product(args.backends, args.forms, args.checked, args.pairs)
        for checked, workspace in (
            (check_one, None),
            (check_one, 1 << (18 if ALL[name] in FULL else 14)),
            (check_three, None),
        )
        if not (ALL[name].per_token and form == "panel") and (checked is check_one or name in IN_THREES)
    ]
    _checked(args, every)


def _checked(args, every):
    """Prints what is wrong; raises at the end."""
    mine, wrong = dealt(args, every), 0
    for at, (checked, backend, form, case, pair, workspace) in list(enumerate(mine))[args.begin :]:
        label = f"{checked.__name__} {backend or 'default'} {form} {case.id} {pair} workspace {workspace}"
        try:
            with forced(form):
                checked(case, *pair, label, args.device, backend=backend, workspace_bytes=workspace)
        except Exception as error:
            wrong += 1
            print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            if not alive(args.device):
                assert args.lives, "the device was lost too often"
                resume(at + 1, args.lives - 1)
    print(f"{len(mine) - args.begin} calls, {wrong} wrong", flush=True)
    assert not wrong
    assert not args.begin, "a device was lost before"


def alive(device):
    """Whether the device still works after an error."""
    try:
        gpu_time.wait(device)
    except Exception:
        return False
    return True


def resume(begin, lives):
    """Replaces this process, which has lost the device, by one that begins at a later call."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv, "--begin", str(begin), "--lives", str(lives)])


def check_one(case, dtype, param_dtype, label, device, **options):
    fn = functools.partial(ctxkern.modulated_linear, **options)
    inputs = make_inputs(case, dtype, param_dtype, device)
    check(fn, inputs, label)
    same_bits(label, run(fn, inputs), run(fn, inputs))


def check_three(case, dtype, param_dtype, label, device, **options):
    """Q, K and V in one call, of different widths."""
    fn = by_projection(functools.partial(ctxkern.modulated_qkv, **options))
    widths = [case.E, case.E // 2 + 1, 1]
    given, douts = qkv_arguments(case, dtype, param_dtype, widths, device=device)
    check_family(fn, by_projection(modulated_qkv_ref), given, douts, label)
    same_bits(label, *(differentiate(fn, given, douts) for _ in range(2)))


def same_bits(label, first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{label}: {name} has other bits the second time"


def stage_graphs(args):
    if args.device == "cpu":
        return print("no graphs on the CPU")
    case = Case("graph", 8, 64, 128, 96, 32, rows=6, index=(0, 1, 2, 3, 4, 5, 0, 1))
    for form, backend in itertools.product(("panel", "outer"), args.backends):
        inputs = make_inputs(case, torch.bfloat16, device=args.device).leaves()
        positional, keyword = inputs.arguments()
        fn = functools.partial(ctxkern.modulated_linear, *positional, backend=backend, **keyword)

        def step(fn=fn, inputs=inputs, positional=positional):
            y = fn()
            return y, *torch.autograd.grad(y, [t for t in positional if t is not None], inputs.dy)

        with forced(form):
            replay, results = captured(step)
            for index in ((5, 5, 5, 5, 0, 0, 3, 3), (1, 0, 1, 0, 1, 0, 1, 0), (0, 1, 2, 3, 4, 5, 0, 2)):
                inputs.context_index.copy_(torch.tensor(index))
                replay()
                torch.cuda.synchronize()
                for got, want in zip(results, step(), strict=True):
                    assert torch.equal(got, want), f"a replay differs with context_index {index}"
    return print("replays agree with eager calls, bit for bit")


def stage_small(args):
    """What the sanitizer runs: each kernel once or twice."""
    for form, backend, name, pair in itertools.product(("panel", "outer"), args.backends, SMALL, args.pairs):
        inputs = make_inputs(ALL[name], *DTYPES[pair], args.device)
        with forced(form):
            run(functools.partial(ctxkern.modulated_linear, backend=backend), inputs)
    print("ran")


def stage_sanitize(_):
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


STAGES = {"about": stage_about, "right": stage_right, "graphs": stage_graphs, "check": stage_check}
STAGES |= {"small": stage_small, "sanitize": stage_sanitize, **gpu_time.STAGES, **gpu_probe.STAGES}


def finished(stage, args, given, seconds):
    """Runs a stage in separate processes; returns what was wrong, or ""."""
    count = args.cores if stage in SHARED else 1
    command = [sys.executable, __file__, *given, "--here", "--stages", stage, "--processes", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if count > 1 else None
    running = [
        subprocess.Popen([*command, "--part", str(part)], env=environment, start_new_session=True)
        for part in range(count)
    ]
    until = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(0.1, until - time.monotonic())) for process in running]
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return "failed" if any(statuses) else ""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    # Triton looks at it when it is first imported
    os.environ["TRITON_INTERPRET"] = str(int(args.rehearse))
    if args.here:
        args.backends = [name for name in args.backends if ctxkern.backends()[name]]
        for stage in args.stages:
            STAGES[stage](args)
        return
    # what stops this process stops its stages too, which run in other sessions and would disturb later timings
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    until = time.monotonic() + (args.limit or float("inf"))
    failed = []
    for stage in args.stages:
        seconds = min(LIMITS.get(stage, 300), until - time.monotonic())
        print(f"== {stage}", flush=True)
        started = time.perf_counter()
        wrong = finished(stage, args, argv, seconds) if seconds > 5 else "no time was left"
        failed += [stage] * bool(wrong)
        print(f"== {stage}: {wrong or 'done'} in {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

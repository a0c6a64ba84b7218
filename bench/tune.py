"""The tile table of the Triton kernels, ctxkern/runtime/triton/tile_table.csv: python bench/tune.py

On a GPU every kernel runs with each candidate tile, in CUDA graphs of the calls that use it, all candidates of a kernel
interleaved, and the fastest becomes the row of this architecture; one whose results are not those of the row that there
was is left out. Before, candidates are compiled by as many processes as there are cores. Rows are written one by one.

    python bench/tune.py                              this GPU, every kernel
    python bench/tune.py --kernels panel_y outer_y    some of them; --dtypes half mixed float32
    python bench/tune.py --compile sm_100 gfx942      no GPU: the largest candidates that compile without faults
                                                      (bench/audit.py) in every variant; rows that were timed stay
    python bench/tune.py --rehearse                   does the script itself run? In the interpreter, nothing written
"""

import argparse
import csv
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

# a bare tree is enough
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import ctxkern
from ctxkern.testing import force
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.families import lora_arguments
from ctxkern.testing.measure import captured, interleaved, provenance

# rows of the table, in its order; a row's tile is that of the kernels of its name or of these
KERNELS = ("panel_y", "panel_weights", "panel_weights_long", "panel_g", "panel_dx", "panel_dbilinear")
KERNELS += ("outer_y", "outer_dx", "outer_dbilinear", "matmul")
LORA = ("lora_y", "lora_y_high", "lora_dx", "lora_dx_high", "lora_dab", "lora_dab_high")
KERNELS += LORA
LAUNCHED = {"panel_weights_long": ("panel_weights", "panel_dcontext"), "lora_dab": ("lora_dab", "lora_dab_sum")}
LAUNCHED |= {"lora_y_high": ("lora_y",), "lora_dx_high": ("lora_dx",), "lora_dab_high": ("lora_dab", "lora_dab_sum")}
# sizes of a tile that are another kernel's, or that all ranks take
FIXED = {"panel_dx": 0, "lora_dab": 1, "lora_dab_high": 1}
# as the table calls them
DTYPES = {
    "half": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "wide": (torch.float16, torch.float32),
    "narrow": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
LAYOUTS = ("aligned", "unaligned")
# architectures that the table has rows of
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# and those that take their tiles
ALIKE = {"sm_89": ("sm_120",)}
PANEL = [Case("training", 16, 512, 1024, 1024, 32), Case("projection", 32, 512, 1024, 1024, 64)]
ODD = [Case("odd", 13, 97, 385, 391, 47)]
LONG = [Case("long", 16, 256, 512, 512, 300)]
OUTER = [Case("decode", 64, 1, 2048, 2048, 32), Case("decode-few", 8, 1, 1024, 1024, 64)]
ADAPTERS = [Case("adapters", 16, 512, 2048, 2048, 1, weight=False)]
ADAPTERS_ODD = [Case("adapters-odd", 13, 97, 385, 391, 1, weight=False)]


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", nargs="*", choices=TARGETS, metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="for all candidates of a kernel and case")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile (0: none)")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=12, help="candidates of a kernel (default: 12)")
    args = parser.parse_args(argv)
    args.device = "cpu" if args.rehearse else "cuda"
    return args


def candidates(kernel, t, smaller):
    """Tiles around t, itself first: those that differ least, or only smaller ones from large to small."""
    sizes = [sorted({max(16, s // 2), s, min(s * 2, 256)}) for s in t[:3]]
    if kernel in FIXED:
        sizes[FIXED[kernel]] = [t[FIXED[kernel]]]
    made = [type(t)(*each) for each in itertools.product(*sizes, (4, 8), (2, 3, 4))]
    # sums per thread: enough to be worth a tile, few enough for registers
    made = [c for c in made if c != t and 4 <= c.rows * c.columns / (32 * c.warps) <= 128]
    if smaller:
        made = sorted(
            (c for c in made if _work(c) <= _work(t)), key=lambda c: (-_work(c), c.warps != t.warps, -c.stages)
        )
    else:
        made.sort(key=lambda c: (sum(a != b for a, b in zip(c, t, strict=True)), -_work(c)))
    return [t, *made]


def _work(t):
    return t.rows * t.columns * t.depth


def of_table(kernel, kind, arch, layout):
    from ctxkern.runtime.triton import tiles

    return tiles.found(kernel, kind, arch, layout == "aligned")


def with_tile(kernel, t):
    """Calls take this tile within it, and the form that has the kernel."""
    outer = kernel.startswith("outer") or kernel == "matmul"
    return force(strategy="outer" if outer else "panel", tiles={kernel: t})


def write(key, t, source):
    """The row into the table and its file, sorted as it was."""
    from ctxkern.runtime.triton import tiles

    tiles._TILES[key] = t
    tiles.forget()
    with tiles.TABLE.open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    rows = [row for row in rows if row[:4] != key] + [(*key, *map(str, t), source)]
    last = tiles.ANY
    rows.sort(key=lambda row: (KERNELS.index(row[0]), row[1], row[2] != last, row[2], row[3] != last, row[3]))
    columns = ("kernel", "dtypes", "architecture", "layout", *t._fields, "source")
    with tiles.TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


@functools.cache
def _faults(launch, arch):
    from ctxkern.testing.kernels import audit, faults

    return faults(launch, arch, audit(launch, arch))


def compiled(kernel, kind, arch, layout, t):
    """Faults of the kernel's launches for a target and those alike, of the problems of a layout."""
    from ctxkern.testing.kernels import LORA_PROBLEMS, PROBLEMS, launches_of

    def of_layout(problem):
        return problem[0].id.endswith(("-odd", "-odd-high", "-eights")) == (layout == "unaligned")

    dtypes = [DTYPES[kind]]
    if kernel in LORA:
        # whose rows are scaled between two products
        dtypes += [(torch.float16, torch.float16)] * (kind == "half")
        given = (), dtypes, [*filter(of_layout, LORA_PROBLEMS)]
    else:
        given = [*filter(of_layout, PROBLEMS)], dtypes
    with force(tiles={kernel: t}):
        launches = launches_of(arch, *given)
    for launch in launches:
        if launch.name in LAUNCHED.get(kernel, (kernel,)) and takes(launch, kernel):
            for each in (arch, *ALIKE.get(arch, ())):
                found = _faults(launch, each)
                if found:
                    return found
    return []


def takes(launch, kernel):
    """Whether a launch's tile is the kernel's row, of those that have several."""
    from ctxkern.lora.triton.call import FEW_RANKS

    constants = dict(launch.constants)
    if kernel in LORA:
        return (constants["BLOCK_R"] > FEW_RANKS) == kernel.endswith("_high")
    whole = constants.get("WHOLE_K")
    return {"panel_weights": whole, "panel_weights_long": not whole}.get(kernel, True)


def runs(kernel, kind):
    """Whether a kernel has launches: of many ranks, those of float32 products are several of few."""
    return not kernel.endswith("_high") or kind in ("half", "mixed")


def compile_for(args, arch):
    """Rows of a target where the tile that it has is at fault."""
    for key in keys(args, arch):
        first = of_table(*key)
        for t in candidates(key[0], first, True):
            wrong = compiled(*key, t)
            print(*key, *t, "|", *wrong, flush=True)
            if not wrong:
                break
        if wrong:
            print(*key, "no candidate without faults", file=sys.stderr, flush=True)
        elif t != first:
            write(key, t, "compiled")


def calls_of(args, kernel, kind, case):
    """Forward or forward and backward of a case, whichever the kernel is in."""
    dtype, param_dtype = DTYPES[kind]
    if kernel in LORA:
        return _lora_call(args, kernel, case, dtype, param_dtype)
    inputs = make_inputs(case, dtype, param_dtype, args.device).leaves()
    positional, keyword = inputs.arguments()
    given = [t for t in positional if t is not None]

    def call():
        y = ctxkern.modulated_linear(*positional, **keyword, backend="triton")
        return (y,) if kernel == "outer_y" else (y, *torch.autograd.grad(y, given, inputs.dy))

    return call


def _lora_call(args, kernel, case, dtype, param_dtype):
    rank = 256 if kernel.endswith("_high") else 16
    arguments, dout = lora_arguments(case, rank, dtype, param_dtype)
    arguments = {n: t.to(args.device) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    dout = dout.to(args.device)
    given = [arguments[name].requires_grad_() for name in ("x", "A", "B")]

    def call():
        y = ctxkern.lora_linear(**arguments, backend="triton")
        return (y,) if kernel.startswith("lora_y") else (y, *torch.autograd.grad(y, given, dout))

    return call


def cases_of(args, kernel, layout):
    if args.rehearse:
        return [Case("tiny", 2, 8, 16, 16, 4, weight=kernel not in LORA)]
    if kernel in LORA:
        return ADAPTERS_ODD if layout == "unaligned" else ADAPTERS
    if layout == "unaligned":
        return ODD
    if kernel.startswith("outer") or kernel == "matmul":
        return OUTER
    return LONG if kernel == "panel_weights_long" else PANEL


def tried(args, kernel, kind, arch, layout):
    """The candidates for a row."""
    found = of_table(kernel, kind, arch, layout)
    some = candidates(kernel, found, False)
    # with less of K at a time panel_weights_long would run
    return [c for c in some if kernel != "panel_weights" or c.depth >= found.depth][: 2 if args.rehearse else args.most]


def keys(args, arch):
    every = itertools.product(args.kernels, args.dtypes, LAYOUTS)
    return [(kernel, kind, arch, layout) for kernel, kind, layout in every if runs(kernel, kind)]


def compile_part(args, arch):
    """This process's share of all candidates, once each."""
    every = [
        (key, t, case) for key in keys(args, arch) for t in tried(args, *key) for case in cases_of(args, key[0], key[3])
    ]
    for key, t, case in every[args.part :: args.processes]:
        try:
            with with_tile(key[0], t):
                calls_of(args, key[0], key[1], case)()
        except Exception as error:
            print(*key, t, f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


def same(results, first):
    """Whether results are those of another tile, but for the order of sums."""
    return all(
        (a.double() - b.double()).norm() <= 0.02 * b.double().norm() for a, b in zip(results, first, strict=True)
    )


def timed(args, kernel, kind, arch, layout):
    """{tile: geometric mean of its medians in seconds} of the candidates that run."""
    key, some = (kernel, kind, arch, layout), tried(args, kernel, kind, arch, layout)
    cases, sums = cases_of(args, kernel, layout), {}
    for case in cases:
        fns, first = {}, None
        for t in some:
            call = calls_of(args, kernel, kind, case)
            try:
                with with_tile(kernel, t):
                    results = call()
                    first = results if first is None else first
                    if not same(results, first):
                        print(*key, t, "has other results", flush=True)
                        continue
                    # the tile is in the graph; without one it would be looked up at every call
                    fns[t] = _within(kernel, t, call) if args.rehearse else captured(call)[0]
            except Exception as error:
                print(*key, t, f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        for t, timing in interleaved(fns, args.seconds, device=args.device).items():
            sums[t] = sums.get(t, 0.0) + math.log(timing.p50) / len(cases)
            print(*key, case.id, *t, f"{timing.p50 * 1e6:.1f} µs", flush=True)
    return {t: math.exp(total) for t, total in sums.items() if t in fns}


def _within(kernel, t, call):
    def run():
        with with_tile(kernel, t):
            return call()

    return run


def tune(args, arch, source):
    for key in keys(args, arch):
        times = timed(args, *key)
        if times:
            best = min(times, key=times.get)
            print(*key, "->", *best, flush=True)
            if not args.rehearse:
                write(key, best, source)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    # Triton looks at it when it is first imported
    os.environ["TRITON_INTERPRET"] = str(int(args.rehearse))
    if args.compile is not None:
        for arch in args.compile or TARGETS:
            compile_for(args, arch)
        return
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU here: --compile TARGET chooses tiles without one, --rehearse tries the script")
    from ctxkern.runtime.triton import tiles

    arch, about = tiles.architecture(torch.device(args.device)), provenance(args.device)
    if args.part is not None:
        compile_part(args, arch)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *argv, "--processes", str(args.processes), "--part"]
    parts = [subprocess.Popen([*command, str(part)], env=environment) for part in range(args.processes)]
    for part in parts:
        part.wait()
    tune(args, arch, f"timed on {about['device']} {about['date']}")


if __name__ == "__main__":
    main()

"""The tile table of the Triton kernels, ctxkern/runtime/triton/tile_table.csv: python bench/tune.py

On a GPU every kernel runs with each candidate tile, in CUDA graphs of the calls that use it, all candidates of a kernel
interleaved, and the fastest becomes the row of this architecture; one whose results are not those of the row that there
was is left out. A row `persistent` is written where one launch is faster than two a strip; without one the panel form
takes two. Before, candidates are compiled by as many processes as there are cores. Rows are written one by one.

    python bench/tune.py                              this GPU, every kernel
    python bench/tune.py --kernels project make       some of them; --dtypes half mixed float32
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

os.environ["TRITON_INTERPRET"] = str(int("--rehearse" in sys.argv))

import torch

import ctxkern
from ctxkern import plan as planner
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.tiles import ALIGNED, ANY, FLOAT, HALF, MIXED, TABLE, UNALIGNED, Tile
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.kernels import PROBLEMS, TARGETS, audit, faults, launches_of
from ctxkern.testing.measure import captured, interleaved, provenance

COLUMNS = ("kernel", "dtypes", "architecture", "layout", *Tile._fields, "source")
# what a launch's name says of its row in the table
KERNELS = {
    "project": ("panel_project",),
    "make": ("panel_make",),
    "make-long": ("panel_make", "panel_dcontext"),
    "gather": ("panel_gather",),
    "turn": ("panel_turn",),
    "spread": ("panel_spread",),
    "outer": ("outer_forward",),
    "outer-turn": ("outer_turn",),
    "outer-spread": ("outer_spread",),
    "product": ("product",),
    "persistent": ("panel_persistent",),
}
DTYPES = {
    HALF: (torch.bfloat16, torch.bfloat16),
    MIXED: (torch.bfloat16, torch.float32),
    FLOAT: (torch.float32, torch.float32),
}
PANEL = [Case("training", 16, 512, 1024, 1024, 32), Case("projection", 32, 512, 1024, 1024, 64)]
ODD = [Case("odd", 13, 97, 385, 391, 47)]
LONG = [Case("long", 16, 256, 512, 512, 300)]
OUTER = [Case("decode", 64, 1, 2048, 2048, 32), Case("decode-few", 8, 1, 1024, 1024, 64)]
# one launch is taken where it is faster by this at least
GAIN = 0.97


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", nargs="*", choices=TARGETS, metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="for all candidates of a kernel and case")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile (0: none)")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=12, help="candidates of a kernel (default: 12)")
    return parser.parse_args()


ARGS = arguments()


def candidates(t, fixed_rows, smaller):
    """Tiles around t, itself first: those that differ least, or only smaller ones from large to small."""
    sizes = [sorted({max(16, s // 2), s, min(s * 2, 256)}) for s in t[:3]]
    if fixed_rows:
        sizes[0] = [t.rows]
    made = [Tile(*each) for each in itertools.product(*sizes, (4, 8), (2, 3, 4))]
    # sums a thread: enough to be worth a tile, few enough for registers
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


def with_tile(key, t):
    """The table with a row replaced; None: as it was, without a row."""
    tiles.forget()
    tiles._TILES.pop(key, None)
    if t is not None:
        tiles._TILES[key] = t


def write(key, t, source):
    """The row into the table's file, sorted as it was."""
    with TABLE.open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    rows = [row for row in rows if row[:4] != key] + ([(*key, *map(str, t), source)] if t else [])
    order = list(KERNELS)
    rows.sort(key=lambda row: (order.index(row[0]), row[1], row[2] != ANY, row[2], row[3] != ANY, row[3]))
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


@functools.cache
def _faults(launch, arch):
    return faults(launch, arch, audit(launch, arch))


def compiled(kernel, kind, arch, layout):
    """Faults of the kernel's launches for a target, of the problems of a layout."""
    problems = [p for p in PROBLEMS if ("odd" in p[0].id) == (layout == UNALIGNED)]
    for launch in launches_of(arch, problems, [DTYPES[kind]]):
        whole = dict(launch.constants).get("WHOLE_K")
        if launch.name in KERNELS[kernel] and (kernel != "make" or whole) and (kernel != "make-long" or not whole):
            found = _faults(launch, arch)
            if found:
                return found
    return []


def compile_for(arch):
    """Rows of a target where the tile that it has is at fault."""
    kept = dict(tiles._TILES)
    for kernel, kind, layout in itertools.product(ARGS.kernels, ARGS.dtypes, (ALIGNED, UNALIGNED)):
        key = kernel, kind, arch, layout
        if kernel == "persistent":
            continue
        first = tiles.found(kernel, kind, arch, layout == ALIGNED)
        for t in candidates(first, kernel == "turn", True):
            with_tile(key, t)
            wrong = compiled(kernel, kind, arch, layout)
            print(*key, *t, "|", *wrong, flush=True)
            if not wrong:
                break
        with_tile(key, kept.get(key))
        if wrong:
            print(*key, "no candidate without faults", file=sys.stderr, flush=True)
        elif t != first:
            with_tile(key, t)
            write(key, t, "compiled")


def calls_of(kernel, kind, case):
    """Forward or forward and backward of a case, whichever the kernel is in."""
    backward = kernel not in ("outer", "persistent")
    dtype, param_dtype = DTYPES[kind]
    inputs = make_inputs(case, dtype, param_dtype, "cpu" if ARGS.rehearse else "cuda").leaves()
    positional, keyword = inputs.arguments()
    given = [t for t in positional if t is not None]

    def call():
        y = ctxkern.modulated_linear(*positional, **keyword, backend="triton")
        return (y, *torch.autograd.grad(y, given, inputs.dy)) if backward else (y,)

    return call


def cases_of(kernel, layout):
    if ARGS.rehearse:
        return [Case("tiny", 2, 8, 16, 16, 4)]
    if layout == UNALIGNED:
        return ODD
    if kernel.startswith("outer") or kernel == "product":
        return OUTER
    return LONG if kernel == "make-long" else PANEL


def tried(kernel, kind, arch, layout):
    """The candidates for a row; None stands for two launches."""
    found = tiles.found("project" if kernel == "persistent" else kernel, kind, arch, layout == ALIGNED)
    some = candidates(found, kernel in ("turn", "persistent"), False)
    # with less of K at a time `make-long` would run
    some = [c for c in some if kernel != "make" or c.depth >= found.depth][: 2 if ARGS.rehearse else ARGS.most]
    return [None, *some] if kernel == "persistent" else some


def put(key, t):
    """Calls take this candidate for a row from now on."""
    kernel = key[0]
    planner.GPU_OUTER_ROWS = 1 << 30 if kernel.startswith("outer") or kernel == "product" else -1
    planner.GPU_PERSISTENT = kernel == "persistent" and t is not None
    with_tile(key, t)


def keys(arch):
    every = itertools.product(ARGS.kernels, ARGS.dtypes, (ALIGNED, UNALIGNED))
    return [(k, kind, arch, layout) for k, kind, layout in every if k != "persistent" or layout == ALIGNED]


def compile_part(arch):
    """This process's share of all candidates, once each."""
    kept = dict(tiles._TILES)
    every = [(key, t, case) for key in keys(arch) for t in tried(*key) for case in cases_of(key[0], key[3])]
    for key, t, case in every[ARGS.part :: ARGS.processes]:
        put(key, t)
        try:
            calls_of(key[0], key[1], case)()
        except Exception as error:
            print(*key, t, f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        with_tile(key, kept.get(key))


def same(results, first):
    """Whether results are those of another tile, but for the order of sums."""
    return all(
        (a.double() - b.double()).norm() <= 0.02 * b.double().norm() for a, b in zip(results, first, strict=True)
    )


def timed(kernel, kind, arch, layout):
    """{tile: geometric mean of its medians in seconds} of the candidates that run; None stands for two launches."""
    key = kernel, kind, arch, layout
    some = tried(*key)
    cases, sums = cases_of(kernel, layout), {}
    for case in cases:
        fns, first = {}, None
        for t in some:
            put(key, t)
            call = calls_of(kernel, kind, case)
            try:
                results = call()
                first = results if first is None else first
                if not same(results, first):
                    print(*key, t, "has other results", flush=True)
                    continue
                fns[t] = call if ARGS.rehearse else captured(call)[0]
            except Exception as error:
                print(*key, t, f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        for t, timing in interleaved(fns, ARGS.seconds, device="cpu" if ARGS.rehearse else "cuda").items():
            sums[t] = sums.get(t, 0.0) + math.log(timing.p50) / len(cases)
            print(*key, case.id, *(t or ("two launches",)), f"{timing.p50 * 1e6:.1f} µs", flush=True)
    with_tile(key, None)
    return {t: math.exp(total) for t, total in sums.items() if t in fns}


def tune(arch, source):
    kept = dict(tiles._TILES)
    for key in keys(arch):
        times = timed(*key)
        with_tile(key, kept.get(key))
        if not times:
            continue
        best = min(times, key=times.get)
        if None in times and best is not None and times[best] > GAIN * times[None]:
            best = None
        print(*key, "->", *(best or ("two launches",)), flush=True)
        if not ARGS.rehearse:
            with_tile(key, best)
            write(key, best, source)


def main():
    if ARGS.compile is not None:
        for arch in ARGS.compile or TARGETS:
            compile_for(arch)
    elif not ARGS.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU here: --compile TARGET chooses tiles without one, --rehearse tries the script")
    else:
        device = torch.device("cpu" if ARGS.rehearse else "cuda")
        arch, about = tiles.architecture(device), provenance(device.type)
        if ARGS.part is not None:
            return compile_part(arch)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *sys.argv, "--processes", str(ARGS.processes), "--part"]
        parts = [subprocess.Popen([*command, str(part)], env=environment) for part in range(ARGS.processes)]
        for part in parts:
            part.wait()
        tune(arch, f"timed on {about['device']} {about['date']}")
    return None


if __name__ == "__main__":
    main()

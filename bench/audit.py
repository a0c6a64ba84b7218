"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, matrix instructions, copies.

    python bench/audit.py                         every target, into bench/results/triton-audit.csv
    python bench/audit.py --arch sm_90            one or more of them, printed only
    python bench/audit.py --arch sm_90 --write    their rows in the table replaced
    python bench/audit.py --dtypes bf16           of some dtypes, printed only

Exit status 1 where a kernel spills, asks for more shared memory than there is, or misses the matrix unit.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

# a bare tree is enough
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton

from ctxkern.testing.cases import DTYPES
from ctxkern.testing.kernels import PROBLEMS, TARGETS, audit, faults, launches_of

COLUMNS = ("arch", "kernel", "projections", "dtypes", "tile", "registers", "spills", "shared", "instructions")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", choices=TARGETS, help="targets (default: all, written to the table)")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="bfloat16 alone, of three problems")
    parser.add_argument("--write", action="store_true", help="replace the rows of these targets in the table")
    args = parser.parse_args(argv)
    rows, wrong = [], []
    # many rows per context, K in several blocks, few rows
    problems = [PROBLEMS[at] for at in (0, 3, -2)] if args.quick else PROBLEMS
    dtypes = [DTYPES[name] for name in (["bf16"] if args.quick else args.dtypes)]
    whole = not args.quick and set(args.dtypes) == set(DTYPES)
    for arch in args.arch or TARGETS:
        for launch in launches_of(arch, problems, dtypes):
            found = audit(launch, arch)
            counted = " ".join(f"{name}={count}" for name, count in found.instructions.items())
            what = (arch, launch.name, launch.projections, launch.dtypes, launch.tile)
            row = (*what, found.registers, found.spills, found.shared, counted)
            rows.append(row)
            for fault in faults(launch, arch, found):
                wrong.append(" ".join((*map(str, what), "|", fault)))
            print(*row, flush=True)
    if whole and (args.write or not args.arch):
        path = Path(__file__).parent / "results" / "triton-audit.csv"
        made = {(*map(str, row), triton.__version__) for row in rows}
        if args.arch and path.exists():
            with path.open(newline="") as file:
                made |= {tuple(row) for row in csv.reader(file) if row[0] in set(TARGETS) - set(args.arch)}
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([(*COLUMNS, "triton"), *sorted(made)])
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

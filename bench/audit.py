"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, matrix instructions, copies.

    python bench/audit.py                         every target, into bench/results/triton-audit.csv
    python bench/audit.py --arch sm_90            one or more of them, printed only
    python bench/audit.py --arch sm_90 --write    their rows in the table replaced
    python bench/audit.py --dtypes bf16           of some dtypes or problems; --write adds their rows
    python bench/audit.py --family lora --write   of the kernels of one family

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

import torch
import triton

from ctxkern.testing import cases
from ctxkern.testing.kernels import LORA_PROBLEMS, PROBLEMS, TARGETS, audit, faults, launches_of

COLUMNS = ("arch", "kernel", "projections", "dtypes", "tile", "registers", "spills", "shared", "instructions")
FAMILIES = ("modulated", "lora")
# adapters in halves beside float32 too
NARROW = {"f32-bf16-params": (torch.float32, torch.bfloat16)}
DTYPES = cases.DTYPES | NARROW


def of_family(kernel, family):
    """Whether an audit of a family, or of all for None, has a kernel."""
    return family is None or kernel.startswith("lora_") == (family == "lora")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", choices=TARGETS, help="targets (default: all, written to the table)")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    known = [case.id for case, *_ in (*PROBLEMS, *LORA_PROBLEMS)]
    parser.add_argument("--problems", nargs="*", choices=known, default=known, help="(default: all)")
    parser.add_argument("--family", choices=FAMILIES, help="(default: both)")
    parser.add_argument(
        "--quick", action="store_true", help="bfloat16 alone, of three problems of modulated_linear and one of lora"
    )
    parser.add_argument("--write", action="store_true", help="replace the rows of these targets in the table")
    args = parser.parse_args(argv)
    rows, wrong = [], []
    # many rows per context, K in several blocks, few rows
    problems = [PROBLEMS[at] for at in (0, 3, -2)] if args.quick else PROBLEMS
    lora = LORA_PROBLEMS[:1] if args.quick else LORA_PROBLEMS
    problems, lora = ([p for p in each if p[0].id in args.problems] for each in (problems, lora))
    if args.family is not None:
        problems, lora = (problems, ()) if args.family == "modulated" else ((), lora)
    dtypes = {name: DTYPES[name] for name in (["bf16"] if args.quick else args.dtypes)}
    whole = not args.quick and set(args.dtypes) == set(DTYPES) and set(args.problems) == set(known)
    for arch in args.arch or TARGETS:
        modulated = [pair for name, pair in dtypes.items() if name not in NARROW]
        for launch in (*launches_of(arch, problems, modulated), *launches_of(arch, (), dtypes.values(), lora)):
            if not of_family(launch.name, args.family):
                continue
            found = audit(launch, arch)
            counted = " ".join(f"{name}={count}" for name, count in found.instructions.items())
            what = (arch, launch.name, launch.projections, launch.dtypes, launch.tile)
            row = (*what, found.registers, found.spills, found.shared, counted)
            rows.append(row)
            for fault in faults(launch, arch, found):
                wrong.append(" ".join((*map(str, what), "|", fault)))
            print(*row, flush=True)
    if args.write or whole and not (args.arch or args.family):
        path = Path(__file__).parent / "results" / "triton-audit.csv"
        made = {(*map(str, row), triton.__version__) for row in rows}
        if path.exists():
            audited = args.arch or TARGETS
            with path.open(newline="") as file:
                rows = [tuple(row) for row in csv.reader(file)][1:]
            stays = {row for row in rows if row[0] not in audited or not of_family(row[1], args.family)}
            made |= stays if whole else set(rows)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([(*COLUMNS, "triton"), *sorted(made)])
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

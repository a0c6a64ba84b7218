"""This tree against another one, `python bench/compare.py FOLDER`: the bench table's cases in turns.

Each tree has two processes, their order is drawn for each round, and a call that is not timed comes first: of equal
trees, one that often followed itself measured 5 % faster. Both trees need their compiled core built in place. Prints
the ratio of each case (above 1: this tree is faster) and geometric means.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean, median

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("f32", "bf16", "bf16-f32-params")
WORKER = """
import json, sys, time
from ctxkern.testing.cases import BENCH_CASES, DTYPES, make_inputs
from ctxkern.testing.peers import calls

cases, ready = {case.id: case for case in BENCH_CASES}, None
for line in sys.stdin:
    asked = json.loads(line)
    if "case" in asked:
        inputs = make_inputs(cases[asked["case"]], *DTYPES[asked["dtypes"]])
        ready = calls(inputs, asked["backward"])["ctxkern"]
        for _ in range(3):
            ready()
        began = time.perf_counter()
        ready()
        answer = time.perf_counter() - began
    else:
        ready()
        began = time.perf_counter()
        for _ in range(asked["times"]):
            ready()
        answer = (time.perf_counter() - began) / asked["times"]
    print(json.dumps(answer), flush=True)
"""


class Tree:
    """A process that measures the package of a folder when it is asked."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve())},
        )

    def ask(self, **question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a tree stopped with {self.process.wait()} at {question}")
        return json.loads(answer)


def compared(trees, case, dtypes, backward, seconds):
    """Median seconds of a call in each tree; trees: [mine, theirs, theirs, mine]."""
    once = max(tree.ask(case=case, dtypes=dtypes, backward=backward) for tree in trees)
    times = max(1, int(0.02 / once))
    rounds = max(4, min(40, int(seconds / (len(trees) * once * times))))
    found, turns, draw = ([], []), list(zip(trees, (0, 1, 1, 0), strict=True)), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(turns)
        for tree, which in turns:
            found[which].append(tree.ask(times=times))
    return [median(each) for each in found]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the other tree")
    parser.add_argument("--seconds", type=float, default=2, help="for each case, dtype and pass (default: 2)")
    parser.add_argument("--cases", nargs="*", default=None, help="by name (default: all)")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from ctxkern.testing.cases import BENCH_CASES

    trees, ratios = [Tree(folder) for folder in (ROOT, args.folder, args.folder, ROOT)], {}
    for case in BENCH_CASES:
        if args.cases is not None and case.id not in args.cases:
            continue
        for name in DTYPES:
            for backward in (False, True):
                mine, theirs = compared(trees, case.id, name, backward, args.seconds)
                kind = f"{name}, {'forward + backward' if backward else 'forward'}"
                ratios.setdefault(kind, {})[case.id] = theirs / mine
                print(
                    f"{case.id:20} {kind:36} {theirs * 1e3:9.4f} → {mine * 1e3:9.4f} ms  {theirs / mine:.3f}",
                    flush=True,
                )
    print()
    for kind, each in ratios.items():
        least = min(each, key=each.get)
        print(f"{kind}: {geometric_mean(each.values()):.3f} over {len(each)} cases; least {each[least]:.3f} at {least}")
    print(f"all: {geometric_mean([r for each in ratios.values() for r in each.values()]):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Many students at once against a loop over experiments: python bench/bench_positional.py

batched: a step of all experiments as one tensor program; loop: the same closed form, one experiment at a time;
autograd: the definition, one experiment at a time, by `loss.backward()`. A step of each in turns, medians. Default: the
10 α × 2 initialisations × 4 seeds of Figure 2 at d = 1000. The two products of a batched step are 16 d C Σ n_α
operations for each seed; the loop does as many, with a pass over the data for each experiment. Students that differ
after a few steps fail before anything is timed. Rows go to bench/results/positional-<device>.csv.
"""

import argparse
import sys
from pathlib import Path

# a bare tree is enough
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ctxkern.experiments.positional.data import draw_samples, draw_student, draw_teacher
from ctxkern.experiments.positional.definition import descend, teacher
from ctxkern.experiments.positional.descent import Descent
from ctxkern.testing.measure import interleaved, provenance
from ctxkern.testing.report import append, results_file

INITS = ("semantic", "positional")
MATRIX = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
OMEGA, RIDGE, LR, CHECKED = 0.3, 0.01, 0.15, 3


def make(alphas, seeds, d):
    """(batched, {(seed, α, init): alone}, {the same: (x, y, Q)}) of float32 experiments."""
    counts = [round(alpha * d) for alpha in alphas]
    stars = torch.stack([draw_teacher(seed, d) for seed in range(seeds)])
    x = torch.stack([draw_samples(seed, counts[-1], d, 0.5) for seed in range(seeds)])
    students = [torch.stack([draw_student(seed, init, star, 1) for init in INITS]) for seed, star in enumerate(stars)]
    query = torch.stack(students)[:, None, None].expand(-1, len(counts), -1, -1, -1, -1).contiguous()
    omegas, ridges = torch.tensor([OMEGA]), torch.tensor([RIDGE] * len(INITS))
    batched = Descent(x, stars, counts, omegas, MATRIX, query.clone(), ridges, LR)
    alone, plain = {}, {}
    for s in range(seeds):
        target = teacher(x[s], stars[s], OMEGA, MATRIX)
        for g, count in enumerate(counts):
            for m in range(len(INITS)):
                mine = query[s : s + 1, g : g + 1, :, m : m + 1].clone()
                one = x[s : s + 1, :count], stars[s : s + 1], [count]
                alone[s, g, m] = Descent(*one, omegas, MATRIX, mine, ridges[:1], LR)
                plain[s, g, m] = x[s, :count], target[:count], query[s, g, 0, m].mT
    return batched, alone, plain


def check(batched, alone, plain):
    """All three give the same students."""
    for _ in range(CHECKED):
        batched.step()
        for one in alone.values():
            one.step()
    for (s, g, m), one in alone.items():
        expected = descend(*plain[s, g, m], ridge=RIDGE, lr=LR, steps=CHECKED).mT
        torch.testing.assert_close(batched.query[s, g, 0, m], one.query[0, 0, 0, 0])
        torch.testing.assert_close(batched.query[s, g, 0, m], expected)


def rows_of(args):
    """A row for each peer."""
    alphas = [args.alpha_max * (i + 1) / args.alphas for i in range(args.alphas)]
    batched, alone, plain = make(alphas, args.seeds, args.d)
    check(batched, alone, plain)

    def loop():
        for one in alone.values():
            one.step()

    def autograd():
        for x, y, query in plain.values():
            descend(x, y, query, ridge=RIDGE, lr=LR, steps=1)

    peers = {"batched": batched.step, "loop": loop, "autograd": autograd}
    found = interleaved(peers, seconds=args.seconds)
    operations = 16 * args.d * len(INITS) * args.seeds * sum(batched.counts)
    where = {"experiments": len(alone), "d": args.d, "threads": torch.get_num_threads()} | provenance()
    for name, timing in found.items():
        yield {
            "peer": name,
            "ms": round(timing.p50 * 1e3, 2),
            "ms_p20": round(timing.p20 * 1e3, 2),
            "ms_p80": round(timing.p80 * 1e3, 2),
            "rounds": timing.rounds,
            "times_batched": round(timing.p50 / found["batched"].p50, 2),
            "gflops": round(operations / timing.p50 / 1e9, 1),
            **where,
        }


def main(argv=None):
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=1000, help="width of a token (default: 1000)")
    parser.add_argument("--alphas", type=int, default=10, help="how many, evenly up to --alpha-max (default: 10)")
    parser.add_argument("--alpha-max", type=float, default=2.0, help="default: 2")
    parser.add_argument("--seeds", type=int, default=4, help="default: 4")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="to measure for, at least five rounds (default: 60)"
    )
    parser.add_argument("--csv", default=None, help="append rows here (default: bench/results/positional-<device>.csv)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = list(rows_of(args))
    for row in rows:
        print(
            f"{row['peer']:9} {row['ms']:>9.2f} ms a step, {row['times_batched']:>6} × batched, {row['gflops']} GFLOP/s"
        )
    path = args.csv
    if path is None:
        results = results_file("cpu", Path(__file__).resolve().parent / "results")
        path = results.with_name(f"positional-{results.name}")
    append(rows, path, list(rows[0]))


if __name__ == "__main__":
    main()

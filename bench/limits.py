"""How fast the low-rank families could be at most: their products at the peak of the processor, nothing else.

    c++ -std=c++17 -O3 -march=native -w -Icsrc bench/tiles.cpp -o tiles && ./tiles    # GFLOP/s of one thread
    python bench/limits.py bench/results/lora-DEVICE.csv --bfloat16 236 --float32 118

A frozen layer has two products with its weight and six thin ones, one that trains three. × is what a form takes over
the time of them all: kernels of the same products are at most so many times as fast as that form. The means at the end
are of the best form, at the peak and with all products at the rate that the plain linear layer had in the same run.
"""

import argparse
from pathlib import Path
from statistics import geometric_mean

from tables import best_form, last_runs

# by family: columns that name a case, products with the weight
FAMILIES = {
    "lora": (("adapters", "rows", "d", "rank", "dtype"), 2),
    "factored": (("contexts", "rows", "d", "context_dim", "rank", "dtype"), 3),
}
THIN = 6
SAME_RUN = "best at the linear layer's rate"


def limits(path, peaks):
    """[(text of a case, dtype, {peer: its time over that of the products})], the best form as "best", and as `SAME_RUN`
    over the time of the products at the rate of "linear"."""
    family = path.name.split("-")[0]
    columns, products = FAMILIES[family]
    found = []
    for sizes, peers in last_runs(path, *columns).items():
        *numbers, dtype = sizes
        contexts, rows, d, *_, rank = map(int, numbers)
        ms = {peer: float(row["p50_ms"]) for peer, row in peers.items()}
        flops = 2 * contexts * rows * d * (products * d + THIN * rank)
        at_peak = flops / (peaks[dtype] * int(peers["ctxkern"]["threads"]) * 1e6)
        ms["best"] = ms[best_form(family, ms)]
        times = {peer: taken / at_peak for peer, taken in ms.items()}
        times[SAME_RUN] = ms["best"] / (ms["linear"] * (1 + THIN * rank / (products * d)))
        found.append((" × ".join(numbers), dtype, times))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--bfloat16", type=float, required=True, help="GFLOP/s of one thread")
    parser.add_argument("--float32", type=float, required=True, help="GFLOP/s of one thread")
    args = parser.parse_args()
    found = limits(args.results, {"bfloat16": args.bfloat16, "float32": args.float32})
    shown = [peer for peer in ("best", "one by one", "PEFT in turn", "linear", "ctxkern") if peer in found[0][2]]
    for sizes, dtype, times in found:
        print(f"{sizes:28} {dtype:9}", *(f"{peer} {times[peer]:.2f} ×" for peer in shown if peer in times))
    kinds = sorted({kind for _, kind, _ in found})
    for name, kept in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        of_best, of_run = (
            geometric_mean([times[form] for _, kind, times in found if kind in kept]) for form in ("best", SAME_RUN)
        )
        print(f"{name}: at most {of_best:.2f} × the best form, {of_run:.2f} × at the linear layer's rate")


if __name__ == "__main__":
    main()

"""The README's picture: a training step against the number of contexts, in time and temporary memory. Writes
headline.png and headline.csv under bench/results."""

import csv
from dataclasses import replace

import pytest
import torch

from ctxkern.experiments.core.plots import BLUE, MUTED, ORANGE, save_figure
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import interleaved, peak_extra_bytes, provenance
from ctxkern.testing.oracle import check
from ctxkern.testing.peers import calls, forms

# U contexts, each with one sequence of 128 tokens
CASE = Case("headline", 8, 128, 512, 512, 64)
CONTEXTS = (4, 8, 16, 32, 64, 128)
PEERS = {
    "einsum": ("einsum", ORANGE),
    "ctxkern": ("ctxkern", BLUE),
    "linear": ("one shared linear layer", MUTED),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _rows(name, seconds):
    for count in CONTEXTS:
        case = replace(CASE, B=count)
        inputs = make_inputs(case, DTYPES[name])
        check(forms(inputs)["ctxkern"], inputs, case.id)
        run = {peer: fn for peer, fn in calls(inputs, backward=True).items() if peer in PEERS}
        memory = {peer: peak_extra_bytes(fn) for peer, fn in run.items()}
        for peer, timing in interleaved(run, seconds, min_rounds=5).items():
            yield {
                **provenance(),
                "dtype": name,
                "contexts": count,
                "peer": peer,
                "p20_ms": f"{timing.p20 * 1e3:.4f}",
                "p50_ms": f"{timing.p50 * 1e3:.4f}",
                "p80_ms": f"{timing.p80 * 1e3:.4f}",
                "peak_mib": f"{memory[peer] / 2**20:.1f}",
            }


def _plot(rows, path):
    panels = [
        ("float32", "p50_ms", "Time of a step, float32", "ms"),
        ("bfloat16", "p50_ms", "Time of a step, bfloat16", "ms"),
        ("float32", "peak_mib", "Temporary memory, float32", "MiB"),
    ]

    def draw(figure):
        axes = figure.subplots(1, len(panels))
        for axis, (dtype, column, title, unit) in zip(axes, panels, strict=True):
            for peer, (label, color) in PEERS.items():
                points = [
                    (row["contexts"], float(row[column]))
                    for row in rows
                    if (row["dtype"], row["peer"]) == (dtype, peer)
                ]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=color)
            axis.set_xscale("log", base=2)
            axis.set_xticks(CONTEXTS, [str(count) for count in CONTEXTS])
            axis.set(title=title, xlabel="contexts in the batch, 128 tokens each", ylabel=unit)
            axis.set_ylim(bottom=0)
        axes[0].legend()
        device, threads = rows[0]["device"], rows[0]["threads"]
        figure.suptitle(f"Forward + backward of 512 → 512 with K = 64 ({device}, {threads} threads)", fontsize=9)

    save_figure(draw, path, (11, 3.4))


def test_headline(request):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("measures the CPU")
    folder = request.config.rootpath / "bench" / "results"
    seconds = request.config.getoption("--seconds") * 2
    rows = [row for name in DTYPES for row in _rows(name, seconds)]
    with (folder / "headline.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, folder / "headline.png")

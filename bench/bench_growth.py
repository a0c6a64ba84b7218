"""How the cost grows with contexts, tokens, context_dim and width, compared with the einsum's and a plain linear
layer's: one picture and one CSV under bench/results."""

import csv
from dataclasses import replace

import pytest
import torch

from ctxkern.dtypes import name_of
from ctxkern.experiments.core.plots import BLUE, FAINT, MUTED, ORANGE, save_figure
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import interleaved, provenance
from ctxkern.testing.oracle import check
from ctxkern.testing.peers import calls, forms
from ctxkern.testing.report import results_file

# one size at a time grows from this one; U sequences of S tokens, so that tokens grow with contexts
BASE = Case("base", 8, 128, 256, 256, 32)
GROWTH = {
    "contexts U (8192 / U tokens each)": [replace(BASE, B=u, S=8192 // u) for u in (4, 8, 16, 32, 64, 128)],
    "tokens per context S": [replace(BASE, S=s) for s in (32, 64, 128, 256, 512, 1024)],
    "context_dim K": [replace(BASE, K=k) for k in (8, 16, 32, 64, 128, 256)],
    "width D = E": [replace(BASE, D=d, E=d) for d in (64, 128, 256, 512, 1024)],
}
PEERS = {"ctxkern": BLUE, "einsum": ORANGE, "addmm+bmm": FAINT, "linear": MUTED}


def _size(name, case):
    return {"contexts": case.B, "tokens": case.S, "context_dim": case.K, "width": case.D}[name.split()[0]]


def _rows(dtype, seconds):
    for name, cases in GROWTH.items():
        for case in cases:
            inputs = make_inputs(case, dtype)
            check(forms(inputs)["ctxkern"], inputs, name)
            run = {peer: fn for peer, fn in calls(inputs, backward=True).items() if peer in PEERS}
            for peer, timing in interleaved(run, seconds, min_rounds=3).items():
                yield {
                    **provenance(),
                    "dtype": name_of(dtype),
                    "grows": name,
                    "size": _size(name, case),
                    "peer": peer,
                    "p50_ms": f"{timing.p50 * 1e3:.4f}",
                }


def _plot(rows, path):
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))

    def draw(figure):
        axes = figure.subplots(len(dtypes), len(GROWTH), squeeze=False)
        for line, dtype in zip(axes, dtypes, strict=True):
            for axis, name in zip(line, GROWTH, strict=True):
                for peer, color in PEERS.items():
                    points = [
                        (row["size"], float(row["p50_ms"]))
                        for row in rows
                        if (row["dtype"], row["grows"], row["peer"]) == (dtype, name, peer)
                    ]
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=peer, color=color)
                axis.set_xscale("log", base=2)
                axis.set(yscale="log", xlabel=name, title=f"{dtype}, forward + backward")
            line[0].set_ylabel("ms")
        axes[0][0].legend()
        base = f"where it does not grow: U={BASE.B}, S={BASE.S}, D=E={BASE.D}, K={BASE.K}"
        figure.suptitle(f"{rows[0]['device']}, {rows[0]['threads']} threads; {base}", fontsize=9)

    save_figure(draw, path, (14, 3.5 * len(dtypes)))


def test_growth(request):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("measures the CPU")
    path = results_file("cpu", request.config.rootpath / "bench" / "results")
    seconds = request.config.getoption("--seconds") / 4
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in _rows(dtype, seconds)]
    with path.with_name(f"{path.stem}-growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, path.with_name(f"{path.stem}-growth.png"))

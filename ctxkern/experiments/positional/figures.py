"""The pictures: errors and overlaps against α, maps over α and ω, λ by cross-validation, concentration with d."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.plots import BLUE, INK, MUTED, ORANGE, save_figure
from ctxkern.experiments.positional.published import LINEAR_TRANSITIONS, TRANSITIONS
from ctxkern.experiments.positional.results import curve, means, theory_transitions
from ctxkern.experiments.positional.sweep import Row

COLOURS = {"semantic": ORANGE, "positional": BLUE, "random": INK}
_OVERLAPS = {"m": "m, along the positions", "theta": "θ, along the teacher"}
# labels of a logarithmic axis, which are mathematical notation otherwise
_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_DOTS = {"linestyle": "none", "marker": "o", "markersize": 3.5, "capsize": 2, "elinewidth": 0.9}


def _dots(axes: Any, xs: Sequence[float], ys: Sequence[float], spread: Sequence[float], **look: Any) -> None:
    known = not any(map(math.isnan, spread))
    axes.errorbar(xs, ys, yerr=spread if known else None, **_DOTS | look)


def _transition_line(axes: Any, alpha: float | None, text: str) -> None:
    if alpha is not None:
        axes.axvline(alpha, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label=f"{text} {alpha:.2f}")


def plot_curves(
    summaries: Sequence[Mapping], gap_rows: Sequence[Row], theory: Sequence[Row], path: Path, d: int
) -> None:
    """Training gap, test errors and overlaps against α: dots with standard deviations over seeds, theory as lines.

    Args:
        summaries: of `summarise`, at one ω and one λ.
        gap_rows: of `gaps`.
        theory: of `theory_rows`, or nothing.
        path: the PNG to write.
        d: width of a token.
    """
    omega = summaries[0]["omega"]
    crossing, linear_crossing = theory_transitions(theory, omega) if theory else (None, None)

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        left.axhline(0, color=INK, linewidth=0.8)
        _dots(left, *means(gap_rows, "gap", omega), color=INK, label=f"descent, d = {d}")
        if theory:
            alphas, semantic = curve(theory, "train_error", "semantic", omega)
            positional = curve(theory, "train_error", "positional", omega)[1]
            gap = [d * (a - b) for a, b in zip(positional, semantic, strict=True)]
            left.plot(alphas, gap, color=MUTED, label="theory")
        _transition_line(left, crossing, "theory: α_c =")
        left.set_title("training error: positional − semantic")
        for init, colour in COLOURS.items():
            mine = [row for row in summaries if row["init"] == init]
            if not mine:
                continue
            xs = [row["alpha"] for row in mine]
            _dots(
                middle,
                xs,
                *([row[f"test_error{end}"] for row in mine] for end in ("", "_sd")),
                color=colour,
                label=init,
            )
            if theory and init != "random":
                middle.plot(*curve(theory, "test_error", init, omega), color=colour)
        linear = {row["alpha"]: row["linear_test_error"] for row in summaries}
        middle.plot(list(linear), list(linear.values()), color=MUTED, linestyle=(0, (4, 2)), label="linear baseline")
        middle.set_ylim(bottom=0)
        middle.set_title("test error")
        _draw_overlaps(right, summaries, theory, omega)
        for axes in (left, middle, right):
            axes.set_xlabel("α = samples / d")
            axes.legend(fontsize=7.5)

    save_figure(draw, path, (11.0, 3.5))


def _draw_overlaps(axes: Any, summaries: Sequence[Mapping], theory: Sequence[Row], omega: float) -> None:
    for init, name in (("positional", "m"), ("semantic", "theta")):
        mine = [row for row in summaries if row["init"] == init]
        other = "theta" if name == "m" else "m"
        xs = [row["alpha"] for row in mine]
        colour = COLOURS[init]
        _dots(axes, xs, *([row[name + end] for row in mine] for end in ("", "_sd")), color=colour,
              label=f"{init}: {_OVERLAPS[name]}")  # fmt: skip
        _dots(axes, xs, *([row[other + end] for row in mine] for end in ("", "_sd")), color=colour, marker="x",
              alpha=0.45, label=f"{init}: {'θ' if name == 'm' else 'm'}")  # fmt: skip
        if theory:
            axes.plot(*curve(theory, name, init, omega), color=colour)
    axes.set_ylim(bottom=0)
    axes.set_title("overlaps")


def plot_maps(gap_rows: Sequence[Row], theory: Sequence[Row], path: Path, title: str) -> None:
    """Means over seeds as maps over α and ω, theory's transitions as lines, the published ones as crosses.

    Args:
        gap_rows: of `gaps`.
        theory: of `theory_rows`, or nothing.
        path: the PNG to write.
        title: of the figure.
    """
    omegas = sorted({row["omega"] for row in gap_rows})
    panels = (
        ("gap", "training error: positional − semantic"),
        ("lean", "θ − m of the lower minimum"),
        ("linear_gap", "test error: attention − linear"),
    )

    def draw(figure: Any) -> None:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        for axes, (column, text) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
            table = [means(gap_rows, column, omega)[1] for omega in omegas]
            alphas = means(gap_rows, column, omegas[0])[0]
            top = max(abs(value) for line in table for value in line)
            colours = "PuOr_r" if column == "linear_gap" else "RdBu_r"
            mesh = axes.pcolormesh(alphas, omegas, table, shading="nearest", cmap=colours, vmin=-top, vmax=top)
            figure.colorbar(mesh, ax=axes, pad=0.02)
            number = 1 if column == "linear_gap" else 0
            found = [(theory_transitions(theory, omega)[number], omega) for omega in omegas] if theory else []
            line = [(alpha, omega) for alpha, omega in found if alpha is not None]
            name = "α_l" if number else "α_c"
            if line:
                axes.plot(*zip(*line, strict=True), color=INK, marker=".", label=f"{name}, theory")
            known = LINEAR_TRANSITIONS if number else TRANSITIONS
            axes.plot(list(known.values()), list(known), "x", color=INK, label=f"{name}, published")
            axes.grid(visible=False)
            axes.set_title(text)
            axes.set_xlabel("α = samples / d")
            axes.legend(fontsize=7.5, loc="lower right", frameon=True)
        figure.axes[0].set_ylabel("ω, weight of A in the teacher")

    save_figure(draw, path, (11.5, 3.6))


def plot_ridges(summaries: Sequence[Mapping], path: Path) -> None:
    """Held-out error (dots) and test error (lines) by λ: a panel for each α, a colour for each initialisation."""
    alphas = sorted({row["alpha"] for row in summaries})
    ridges = sorted({row["ridge"] for row in summaries})

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(alphas), sharey=True, squeeze=False)[0]
        for axes, alpha in zip(panels, alphas, strict=True):
            for init, colour in COLOURS.items():
                mine = [row for row in summaries if row["init"] == init and row["alpha"] == alpha]
                if not mine:
                    continue
                places = [ridges.index(row["ridge"]) for row in mine]
                held = ([row[f"held_error{end}"] for row in mine] for end in ("", "_sd"))
                _dots(axes, places, *held, color=colour, label=f"{init}, held out")
                axes.plot(places, [row["test_error"] for row in mine], color=colour, label=f"{init}, test set")
            # 0 may be among them
            axes.set_xticks(range(len(ridges)), [f"{ridge:g}" for ridge in ridges])
            axes.set_title(f"α = {alpha:g}")
            axes.set_xlabel("weight decay λ")
        panels[0].set_ylabel("error of a sample")
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7.5, loc="outside lower center", ncols=4)

    save_figure(draw, path, (max(6.0, 2.9 * len(alphas) + 0.6), 3.5))


def plot_concentration(summaries: Sequence[Mapping], theory: Sequence[Row], path: Path) -> None:
    """Overlaps and test errors against d, with theory's limit, and their standard deviations over seeds."""
    widths = sorted({row["d"] for row in summaries})
    named = {"positional": "m", "semantic": "theta"}

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for init, name in named.items():
            mine, colour = [row for row in summaries if row["init"] == init], COLOURS[init]
            limit = {row["init"]: row for row in theory}.get(init)
            for axes, column in ((left, name), (middle, "test_error")):
                label = f"{init}: {_OVERLAPS[name]}" if axes is left else init
                _dots(
                    axes,
                    widths,
                    *([row[column + end] for row in mine] for end in ("", "_sd")),
                    color=colour,
                    label=label,
                )
                if limit is not None and not math.isnan(limit[column]):
                    axes.axhline(limit[column], color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
            for column, marker in ((name, "o"), ("test_error", "s")):
                spread = [row[f"{column}_sd"] / row[column] for row in mine]
                text = f"{init}: {'test error' if column == 'test_error' else _OVERLAPS[name][0]}"
                right.plot(widths, spread, color=colour, marker=marker, markersize=3.5, linewidth=0.9, label=text)
        first = max(row["test_error_sd"] / row["test_error"] for row in summaries if row["d"] == widths[0])
        right.plot(widths, [first * (widths[0] / width) ** 0.5 for width in widths], color=MUTED, linestyle=(0, (1, 2)),
                   label="∝ d^−1/2")  # fmt: skip
        right.set_yscale("log")
        low, high = right.get_ylim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        left.set_title("overlaps; dashed: theory" if theory else "overlaps")
        middle.set_title("test error")
        right.set_title("spread over seeds / mean")
        for axes in (left, middle, right):
            axes.set_xscale("log")
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.minorticks_off()
            axes.set_xlabel("d")
            axes.legend(fontsize=7.5)
        left.set_ylim(bottom=0)
        middle.set_ylim(bottom=0)

    save_figure(draw, path, (11.0, 3.4))


def plot_theory(theory: Sequence[Row], path: Path) -> None:
    """Training gap, test errors and overlaps in theory against α; a shade for each ω, at the first λ."""
    ridge = theory[0]["ridge"]
    rows = [row for row in theory if row["ridge"] == ridge]
    omegas = sorted({row["omega"] for row in rows})

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        left.axhline(0, color=INK, linewidth=0.8)
        for number, omega in enumerate(omegas):
            shade = 1 - 0.7 * number / len(omegas)
            alphas, semantic = curve(rows, "train_error", "semantic", omega)
            positional = curve(rows, "train_error", "positional", omega)[1]
            gap = [a - b for a, b in zip(positional, semantic, strict=True)]
            left.plot(alphas, gap, color=INK, alpha=shade, label=f"ω = {omega:g}")
            for branch in ("semantic", "positional"):
                look = {"color": COLOURS[branch], "alpha": shade, "label": None if number else branch}
                middle.plot(*curve(rows, "test_error", branch, omega), **look)
                right.plot(*curve(rows, "theta" if branch == "semantic" else "m", branch, omega), **look)
        left.set_title("training error / d: positional − semantic")
        middle.set_title("test error")
        right.set_title("θ (semantic), m (positional)")
        for axes in (left, middle, right):
            axes.set_xlabel("α = samples / d")
            axes.legend(fontsize=7.5)

    save_figure(draw, path, (11.0, 3.4))

"""Pictures of a comparison."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.plots import BLUE, FAINT, INK, MUTED, ORANGE, save_figure
from ctxkern.experiments.multifile.comparison.arms import ARMS, BASE
from ctxkern.experiments.multifile.comparison.results import Summary


def plot_differences(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Each arm's difference from no context: a dot with its 95 % interval, a faint dot a file; parameters, steps and
    the time of a step in numbers."""
    shown = [one for one in summaries if one.arm != BASE]
    base = next(one for one in summaries if one.arm == BASE)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for row, one in enumerate(shown):
            axes.plot(list(one.by_file.values()), [row] * one.files, "o", color=FAINT, markersize=3, zorder=2)
            sure = one.high < 0 or one.low > 0
            colour = BLUE if one.high < 0 else ORANGE if one.low > 0 else MUTED
            axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2, zorder=3)
            axes.plot([one.delta], [row], "o", color=colour, markersize=6.5, zorder=4)
            axes.annotate(
                f"{one.delta:+.3f}", (one.delta, row), xytext=(0, 7), textcoords="offset points", ha="center",
                fontsize=7.5, color=colour, fontweight="bold" if sure else "normal",
            )  # fmt: skip
            numbers = f"{_short(one.parameters)}   {one.steps:,}   {one.step_ms:.0f} ms"
            axes.annotate(
                numbers, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False
            )
        axes.annotate(
            "parameters, steps, a step", (1.02, -0.75), xycoords=("axes fraction", "data"), fontsize=7.5, color=MUTED,
            va="center", annotation_clip=False,
        )  # fmt: skip
        axes.set_yticks(range(len(shown)), [ARMS[one.arm].text for one in shown])
        axes.set_ylim(len(shown) - 0.4, -1.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"validation loss minus that of no context ({base.loss:.3f}), nats per token: lower is better")
        axes.set_title(title)

    save_figure(draw, path, (8.6, 1.5 + 0.44 * len(shown)))


def _apart(values: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending values moved up, or down below `top`, until they are `gap` apart."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    limit = top
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.0f} k"


def plot_positions(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Each arm's difference from no context by position in the window."""
    base = next(one for one in summaries if one.arm == BASE)
    spans = [span for span, loss in base.by_position.items() if math.isfinite(loss)]
    shown = [one for one in summaries if one.arm != BASE and all(span in one.by_position for span in spans)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, len(spans) - 1], [0, 0], color=INK, linewidth=0.9)
        colours = {"bilinear": BLUE, "film": ORANGE}
        ends = []
        for one in shown:
            values = [one.by_position[span] - base.by_position[span] for span in spans]
            axes.plot(range(len(spans)), values, color=colours.get(one.arm, FAINT), marker="o", markersize=3)
            ends.append((values[-1], one.arm))
        low, high = axes.get_ylim()
        ends.sort()
        for (value, arm), place in zip(
            ends, _apart([value for value, _ in ends], 0.05 * (high - low), high), strict=True
        ):
            axes.annotate(
                ARMS[arm].text, (len(spans) - 1, value), xytext=(len(spans) - 0.8, place), fontsize=7.5, va="center",
                color=colours.get(arm, INK), annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5)},
            )  # fmt: skip
        axes.set_xticks(range(len(spans)), spans)
        axes.set_xlim(-0.2, len(spans) - 0.8 + 0.35 * len(spans))
        axes.set_xlabel("position in the window")
        axes.set_ylabel("loss minus that of no context")
        axes.set_title(title)

    save_figure(draw, path, (8.0, 4.0))

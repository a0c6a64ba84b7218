"""The plot style of the project, and the loss plot of a run."""

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_atomic

INK, MUTED, GRID = "#1f2430", "#8a90a0", "#e4e7ee"
BLUE, ORANGE, FAINT = "#2563b8", "#d2601a", "#b9c6dc"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    # file names hold $, _ and %
    "text.parse_math": False,
    "text.usetex": False,
}
# a number of `observe`: the validation loss as the mean over tokens, which a training loss is
BY_TOKEN = "validation_by_token"
# more files than this share one panel
_MAX_PANELS = 36
_NAMED_LINES = 5


def require_matplotlib() -> ModuleType:
    """matplotlib, whatever `MPLBACKEND` names: it reads the variable when it is first imported, and fails if it is bad.

    Raises:
        MissingExtraError: it is not installed.
    """
    before = os.environ.pop("MPLBACKEND", None)
    try:
        return require("matplotlib")
    finally:
        if before is not None:
            os.environ["MPLBACKEND"] = before


def save_figure(draw: Callable[[Any], None], path: str | os.PathLike, figsize: tuple[float, float]) -> None:
    """Make a figure in the project's style, let `draw(figure)` fill it, and write it to `path` as PNG.

    Uses the Agg canvas directly, so that neither the backend in use nor pyplot's state matters or changes. Text is
    shown as it is, without mathematical notation.
    """
    matplotlib = require_matplotlib()
    figure_class = require("matplotlib.figure").Figure
    canvas_class = require("matplotlib.backends.backend_agg").FigureCanvasAgg
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure = figure_class(figsize=figsize, layout="constrained")
        canvas_class(figure)
        draw(figure)
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction; `weight` in [0, 1) is the share of the past."""
    out, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(average / norm)
    return out


def short_name(name: str, width: int) -> str:
    """`name` without its suffix, its middle cut out to fit `width` characters."""
    stem = name.rsplit(".", 1)[0] if "." in Path(name).name[1:] else name
    if len(stem) <= width:
        return stem
    head = (width - 1) // 2
    return f"{stem[:head]}…{stem[len(stem) - (width - 1 - head) :]}"


def _wrapped(name: str, width: int) -> str:
    """`name` whole, on as many lines as it takes, broken after separators where that can be."""
    lines = [""]
    for part in re.findall(r"[^_./ -]*[_./ -]?", name):
        for start in range(0, len(part), width):
            piece = part[start : start + width]
            if len(lines[-1]) + len(piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)


def _curves(rows: Sequence[Mapping]) -> tuple[list, list, list, dict[str, tuple[list, list]]]:
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    mean = [
        (row["step"], row.get("observed", {}).get(BY_TOKEN, row["mean"])) for row in rows if row.get("mean") is not None
    ]
    files: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, loss in row.get("validation", {}).items():
            if loss is not None:
                steps, losses = files.setdefault(name, ([], []))
                steps.append(row["step"])
                losses.append(loss)
    return train, mean, list(files), files


def _draw_line(axes: Any, level: float | None, label: str = "") -> None:
    """The loss of a run to compare with."""
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5, label=label)


def _draw_overall(
    axes: Any, train: list, mean: list, label: str, best_step: int | None, line: float | None, line_label: str
) -> None:
    level = math.inf
    _draw_line(axes, line, line_label)
    # what an untrained model has would squeeze the rest
    shown = [loss for points in (train[len(train) // 10 :], mean[1:] or mean) for _, loss in points]
    shown += [] if line is None else [line]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=FAINT, linewidth=0.8)
        # about a fiftieth of the run
        weight = 1 - 1 / max(1.0, len(losses) / 50)
        smoothed = smooth(losses, weight)
        level = smoothed[-1]
        axes.plot(steps, smoothed, color=BLUE, label="train")
    if mean:
        steps, losses = zip(*mean, strict=True)
        axes.plot(steps, losses, color=ORANGE, marker="o", markersize=3.5, label=label)
        best = steps.index(best_step) if best_step in steps else min(range(len(mean)), key=lambda i: losses[i])
        axes.axvline(steps[best], color=ORANGE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{losses[best]:.3f} at {steps[best]}",
            (steps[best], losses[best]),
            # away from the training curve
            xytext=(0, 9 if losses[best] > level else -15),
            textcoords="offset points",
            ha="right" if best == len(mean) - 1 else "center",
            color=ORANGE,
            fontweight="bold",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(max(0.0, low - 0.15 * (high - low) - 0.02), high + 0.12 * (high - low) + 0.02)
    axes.margins(x=0.02)
    if train or mean:
        axes.legend(loc="best")


def _draw_panels(figure: Any, names: list[str], files: Mapping, columns: int, lines: Mapping) -> None:
    rows = math.ceil(len(names) / columns)
    # room for the figures above the curves
    top = 1.3 * max(max(losses[1:] or losses) for _, losses in files.values())
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for position, axes in enumerate(grid.flat):
        if position >= len(names):
            axes.remove()
            continue
        for other in names:
            axes.plot(*files[other], color=GRID, linewidth=0.7, zorder=1)
        steps, losses = files[names[position]]
        axes.plot(steps, losses, color=ORANGE, zorder=2)
        _draw_line(axes, lines.get(names[position]))
        axes.set_title(_wrapped(names[position], 125 // columns), fontsize=7.5, fontweight="normal")
        axes.text(
            0.97, 0.93, f"{losses[0]:.2f} → {losses[-1]:.2f}",
            transform=axes.transAxes, ha="right", va="top", fontsize=7.5,
        )  # fmt: skip
        axes.tick_params(labelsize=7, labelbottom=position + columns >= len(names))
        axes.locator_params(axis="x", nbins=3)
        axes.set_ylim(0, top)
    figure.suptitle("validation loss by file (grey: all the others)", fontsize=10, x=0.01, ha="left")


def _draw_lines(figure: Any, names: list[str], files: Mapping) -> None:
    axes = figure.subplots()
    ranked = sorted(names, key=lambda name: files[name][1][-1])
    named = {*ranked[:_NAMED_LINES], *ranked[-_NAMED_LINES:]}
    for name in ranked:
        axes.plot(*files[name], color=ORANGE if name in named else FAINT, linewidth=0.9 if name in named else 0.5)
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    # labels at the right end, pushed apart
    lowest = -math.inf
    for name in (name for name in ranked if name in named):
        steps, losses = files[name]
        lowest = max(losses[-1], lowest + 0.035 * top)
        axes.annotate(
            f"{short_name(name, 28)}  {losses[-1]:.2f}",
            (steps[-1], losses[-1]),
            xytext=(1.02, lowest / top),
            textcoords="axes fraction",
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"validation loss by file ({len(names)} files; the {_NAMED_LINES} lowest and highest named)")


def plot_losses(
    rows: Sequence[Mapping],
    path: str | os.PathLike,
    *,
    title: str = "",
    baseline: Sequence[Mapping] = (),
    baseline_label: str = "no context",
) -> None:
    """The loss plot of a run: training loss with mean validation loss, and below it each file's validation loss.

    Args:
        rows: of `read_metrics`.
        path: the PNG to write, whole or not at all.
        title: above the first panel.
        baseline: `rows` of another run, whose losses where their mean is lowest are dotted lines.
        baseline_label: of its line.
    """
    train, mean, names, files = _curves(rows)
    columns = min(5, max(1, math.ceil(math.sqrt(len(names) * 1.5))))
    if len(names) < 2:
        below = 0.0
    elif len(names) <= _MAX_PANELS:
        below = 0.4 + 1.25 * math.ceil(len(names) / columns)
    else:
        below = 4.5

    names = sorted(names, key=lambda name: files[name][1][-1])
    tokens = any(BY_TOKEN in row.get("observed", {}) for row in rows)
    label = "validation" if len(names) == 1 else f"validation, mean over {'tokens' if tokens else 'files'}"
    means = {row["step"]: row["mean"] for row in rows if row.get("mean") is not None}
    best_step = min(means, key=means.__getitem__, default=None)
    lowest = min((row for row in baseline if row.get("mean") is not None), key=lambda row: row["mean"], default=None)
    lines = {} if lowest is None else lowest["validation"]
    line = None if lowest is None else lowest.get("observed", {}).get(BY_TOKEN, lowest["mean"])

    def draw(figure: Any) -> None:
        parts = figure.subfigures(2, 1, height_ratios=[3.4, below]) if below else [figure]
        axes = parts[0].subplots()
        axes.set_title(title)
        _draw_overall(axes, train, mean, label, best_step, line, baseline_label)
        if below and len(names) <= _MAX_PANELS:
            _draw_panels(parts[1], names, files, columns, lines)
        elif below:
            _draw_lines(parts[1], names, files)

    save_figure(draw, path, (9.0, 3.4 + below))

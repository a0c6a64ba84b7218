"""`ctxkern gpt compare`: a model for each text, one for all, and one for all with contexts, at equal steps."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.data.dataset import display_names
from ctxkern.experiments.core.data.paths import expand_paths
from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import BLUE, INK, MUTED, ORANGE, save_figure, short_name
from ctxkern.experiments.core.runs import PlannedRun, add_set_flags, run_set
from ctxkern.experiments.gpt.config import GPTSettings

_CONTEXT_DIM = 16
# settings of one way alone
_CONTEXTS = ("context_dim", "rank", "bilinear_lr_scale", "context_lr_scale")
WAYS = {
    "alone": "a model for each text",
    "shared": "one model, no contexts",
    "contexts": "one model, a context for each text",
}


def add_parser(subparsers: Any) -> None:
    """Register the command in the group."""
    parser = subparsers.add_parser(
        "compare",
        help="a model for each text, one for all, and one for all with contexts, at equal steps",
        description="Train with one set of settings on each text alone, on all together, and on all with a context\n"
        "for each; the losses of whole validation texts as CSV and plot. Called again after a kill, it goes on.",
        epilog="examples:\n  ctxkern gpt compare texts/*.txt --run-dir runs/compared --seeds 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATHS", help="as those of `ctxkern gpt train`")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"with commas between (default: {','.join(WAYS)})")
    add_set_flags(parser)
    GPTSettings.add_flags(parser)
    parser.set_defaults(run=_compare, command="gpt compare")


@dataclass(frozen=True)
class Point:
    """A run: how it trains, on which texts by name, under which seed."""

    way: str
    texts: tuple[str, ...]
    seed: int
    run: PlannedRun


def _compare(args: argparse.Namespace) -> int:
    points: list[Point] = []

    def runs() -> list[PlannedRun]:
        points.extend(plan(args, [Path(os.path.abspath(path)) for path in expand_paths(args.paths)]))
        return [point.run for point in points]

    found = run_set(runs, args)
    rows = results(points, found)
    with as_command_errors():
        if not rows:
            raise CommandError("no text has anything set apart to compare on; raise --val-fraction")
        write_csv_atomic(args.run_dir / "compare.csv", rows)
        plot(rows, args.run_dir / "compare.png", f"{rows[0]['steps']:,} steps each")
    print(table(rows))
    for kind in ("csv", "png"):
        print(f"{'results' if kind == 'csv' else 'plot':<12}{printable(args.run_dir / f'compare.{kind}')}", flush=True)
    return 0


def plan(args: argparse.Namespace, paths: Sequence[Path]) -> list[Point]:
    """The runs that flags ask for on the texts of `paths`.

    Raises:
        CommandError, ValueError: a flag or setting that does not fit.
    """
    ways = list(dict.fromkeys(word.strip() for word in args.ways.split(",")))
    for way in ways:
        if way not in WAYS:
            raise CommandError(f"--ways has {way!r}; it must be one of {', '.join(WAYS)}")
    given, names, points = GPTSettings.given(args), display_names(paths), []
    if "val_file" in given:
        raise CommandError("--val-file is given; it must be left out: every text is validated on its own end")
    if given.get("context_dim") == 0:
        raise CommandError("--context-dim is 0; it must be at least 1 here, as one of the ways has contexts")
    for seed in range(given.get("seed", 0), given.get("seed", 0) + args.seeds):
        for way in ways:
            own = {name: value for name, value in given.items() if way == "contexts" or name not in _CONTEXTS}
            if way == "contexts":
                own.setdefault("context_dim", _CONTEXT_DIM)
            own |= {"seed": seed}
            # raises for a value that does not fit
            GPTSettings(**own)
            for i in range(len(paths)) if way == "alone" else (None,):
                chosen = range(len(paths)) if i is None else (i,)
                name = f"{way}-seed-{seed}" if i is None else f"{way}-{i}-seed-{seed}"
                argv = ["gpt", "train", *(str(paths[k]) for k in chosen), *GPTSettings.arguments(own), "--quiet"]
                points.append(Point(way, tuple(names[k] for k in chosen), seed, PlannedRun(name, argv)))
    return points


def results(points: Sequence[Point], found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each text of each run: the loss of its whole validation text at the last step, in nats a character,
    without those that have none."""
    rows = []
    for point in points:
        result = found[point.run.name]
        for text, loss in zip(point.texts, result["details"]["whole"].values(), strict=True):
            if loss is not None:
                rows.append(
                    {
                        "way": point.way,
                        "text": text,
                        "seed": point.seed,
                        "loss": loss,
                        "steps": result["step"],
                        "vocabulary": result["details"]["vocabulary"],
                        "parameters": result["details"]["parameters"],
                    }
                )
    return rows


def _by(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Losses by way, text and seed."""
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        losses.setdefault(row["way"], {}).setdefault(row["text"], {})[row["seed"]] = row["loss"]
    return losses


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds by text, and of contexts less one model without them, paired by text and seed."""
    losses = _by(rows)
    texts = list(dict.fromkeys(row["text"] for row in rows))
    width = max(map(len, (*texts, "mean over texts")))
    both = "shared" in losses and "contexts" in losses
    heads = [*losses, *(["contexts − shared"] if both else [])]
    lines = [f"{'text':<{width}}" + "".join(f"{head:>{max(10, len(head) + 2)}}" for head in heads)]
    columns: dict[str, list[float]] = {head: [] for head in heads}
    for text in texts:
        for way in losses:
            columns[way].append(_mean(list(losses[way].get(text, {}).values())))
        if both:
            pairs = [losses["contexts"][text][seed] - loss for seed, loss in losses["shared"][text].items()]
            columns[heads[-1]].append(_mean(pairs))
    for i, text in enumerate([*texts, "mean over texts"]):
        values = [columns[head][i] if i < len(texts) else _mean(columns[head]) for head in heads]
        signs = ["+" if head == heads[-1] and both else "" for head in heads]
        cells = [
            f"{value:>{sign}{max(10, len(head) + 2)}.4f}"
            for head, value, sign in zip(heads, values, signs, strict=True)
        ]
        lines.append(f"{text:<{width}}" + "".join(cells))
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Losses by text: a dot for each way and seed, a line at their mean.

    Args:
        rows: of `results`.
        path: the PNG to write.
        title: above it.
    """
    losses = _by(rows)
    texts = list(dict.fromkeys(row["text"] for row in rows))
    colours = dict(zip(WAYS, (MUTED, ORANGE, BLUE), strict=True))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, way in enumerate(losses):
            shift = 0.24 * (number - (len(losses) - 1) / 2)
            for i, text in enumerate(texts):
                found = list(losses[way].get(text, {}).values())
                label = WAYS[way] if i == 0 else None
                axes.scatter([i + shift] * len(found), found, color=colours[way], s=16, zorder=3, label=label)
                if found:
                    mean = _mean(found)
                    axes.hlines(mean, i + shift - 0.09, i + shift + 0.09, color=colours[way], linewidth=1.4)
                    axes.annotate(
                        f"{mean:.2f}", (i + shift, max(found)), xytext=(0, 5), textcoords="offset points",
                        ha="center", fontsize=7, color=INK,
                    )  # fmt: skip
        axes.set_xticks(range(len(texts)), [short_name(text, 22) for text in texts])
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        axes.set_ylabel("validation loss (nats a character)")
        axes.set_title(title)
        axes.legend(loc="best", fontsize=8)

    save_figure(draw, path, (max(6.0, 1.5 * len(texts) + 1.5), 3.6))

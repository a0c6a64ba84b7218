"""`ctxkern ladder show` and `climb`: the four ways to a mean, with their numbers, and all rungs trained alike."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.command import as_command_errors
from ctxkern.experiments.core.data.paths import expand_paths, standard_library_files
from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import BLUE, INK, MUTED, ORANGE, save_figure
from ctxkern.experiments.core.runs import PlannedRun, add_set_flags, run_set
from ctxkern.experiments.ladder import averaging
from ctxkern.experiments.ladder.experiment import LadderSettings
from ctxkern.experiments.ladder.rungs import RUNGS


def add_parsers(subparsers: Any) -> None:
    """Register the commands in the group."""
    text = "the mean of what came before, by a loop, a matrix, a softmax, and a head of attention"
    show = subparsers.add_parser("show", help=text, description=f"Print {text}, on eight tokens of two numbers.")
    show.set_defaults(run=_show, command="ladder show")
    text = "train every rung on the same text: the loss of each as CSV and plot"
    climb = subparsers.add_parser(
        "climb",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Called again after a kill, it goes on.",
        epilog="examples:\n  ctxkern ladder climb shakespeare.txt --run-dir runs/ladder --seeds 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    climb.add_argument(
        "paths", nargs="*", metavar="PATHS", help="texts (default: sources of the Python standard library)"
    )
    add_set_flags(climb)
    LadderSettings.add_flags(climb)
    climb.set_defaults(run=_climb, command="ladder climb")


def _numbers(rows: torch.Tensor, places: int = 4) -> list[str]:
    return ["  ".join(f"{value:>{places + 3}.{places}f}" for value in row) for row in rows.tolist()]


def _show(args: argparse.Namespace) -> int:
    ones, numbers = averaging.triangular_example()
    print("a triangular matrix of ones adds up rows:\n")
    parts = (_numbers(ones, 0), _numbers(numbers, 0), _numbers(ones @ numbers, 0))
    for left, middle, right in zip(*parts, strict=True):
        print(f"  {left}   @   {middle}   =   {right}")
    x = averaging.example()
    means = averaging.mean_by_loop(x)
    print("\neight tokens, and for each the mean of those up to it (v1, a loop):\n")
    for left, right in zip(_numbers(x[0]), _numbers(means[0]), strict=True):
        print(f"  {left}     {right}")
    print("\nthe same by other ways, with the largest difference from the loop:\n")
    for name, ways in (
        ("v2, a product with a triangular matrix", averaging.mean_by_matrix),
        ("v3, weights by a softmax of masked zeros", averaging.mean_by_softmax),
    ):
        print(f"  {name:<42}{float((ways(x) - means).abs().max()):.1e}")
    none = torch.zeros(2, 2)
    same = averaging.head(x, none, none, torch.eye(2))
    print(f"  {'v4, a head whose queries are zero':<42}{float((same - means).abs().max()):.1e}")
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, generator=rng) for _ in range(2))
    scores = (x @ query) @ (x @ key).mT * 2**-0.5
    print("\nv4 with random queries and keys: what the tokens take from one another\n")
    for row in _numbers(averaging.causal_softmax(scores)[0], 2):
        print(f"  {row}")
    return 0


@dataclass(frozen=True)
class Point:
    """A run: its rung and seed."""

    rung: str
    seed: int
    run: PlannedRun


def _climb(args: argparse.Namespace) -> int:
    points: list[Point] = []

    def runs() -> list[PlannedRun]:
        points.extend(plan(args))
        return [point.run for point in points]

    found = run_set(runs, args)
    rows = results(points, found)
    with as_command_errors():
        write_csv_atomic(args.run_dir / "ladder.csv", rows)
        plot(rows, args.run_dir / "ladder.png")
    print(table(rows))
    for kind, name in (("results", "ladder.csv"), ("plot", "ladder.png")):
        print(f"{kind:<12}{printable(args.run_dir / name)}", flush=True)
    return 0


def plan(args: argparse.Namespace) -> list[Point]:
    """The runs that flags ask for.

    Raises:
        ValueError: a setting or path that does not fit.
    """
    paths = expand_paths(args.paths) if args.paths else standard_library_files()
    given, points = LadderSettings.given(args), []
    rungs = (given.pop("rung"),) if "rung" in given else tuple(RUNGS)
    for seed in range(given.get("seed", 0), given.get("seed", 0) + args.seeds):
        for rung in rungs:
            settings = given | {"rung": rung, "seed": seed}
            # raises for a value that does not fit
            LadderSettings(**settings)
            argv = ["ladder", "train", *map(os.path.abspath, paths), *LadderSettings.arguments(settings), "--quiet"]
            points.append(Point(rung, seed, PlannedRun(f"{rung}-seed-{seed}", argv)))
    return points


def results(points: Sequence[Point], found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run: the loss of the whole validation texts at the last step, a mean over texts, in nats a
    character."""
    rows = []
    for point in points:
        result = found[point.run.name]
        known = [loss for loss in result["details"]["whole"].values() if loss is not None]
        rows.append(
            {
                "rung": point.rung,
                "seed": point.seed,
                "loss": sum(known) / len(known) if known else math.nan,
                "steps": result["step"],
                "parameters": result["details"]["parameters"],
            }
        )
    return rows


def _by_rung(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    return {rung: own for rung in RUNGS if (own := [row for row in rows if row["rung"] == rung])}


def _mean_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean over seeds by rung, and what each rung brings."""
    lines = [f"{'rung':<14}{'loss':>8}{'less by':>9}{'parameters':>12}"]
    before = math.nan
    for rung, own in _by_rung(rows).items():
        loss = _mean_loss(own)
        less = "" if math.isnan(before) else f"{before - loss:.4f}"
        lines.append(f"{rung:<14}{loss:>8.4f}{less:>9}{own[0]['parameters']:>12,}")
        before = loss
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss of each rung: a dot for each seed, steps through the means.

    Args:
        rows: of `results`.
        path: the PNG to write.
    """
    rungs = _by_rung(rows)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        means = [_mean_loss(own) for own in rungs.values()]
        places = range(len(rungs))
        axes.step(places, means, where="mid", color=BLUE)
        for i, own in enumerate(rungs.values()):
            axes.scatter([i] * len(own), [row["loss"] for row in own], color=ORANGE, s=16, zorder=3)
            axes.annotate(
                f"{means[i]:.3f}", (i, max(row["loss"] for row in own)), xytext=(0, 6), textcoords="offset points",
                ha="center", fontweight="bold", color=INK,
            )  # fmt: skip
        axes.set_xticks(places, [f"{rung}\n{own[0]['parameters']:,}" for rung, own in rungs.items()])
        axes.set_xlabel("rung, and its parameters", color=MUTED)
        axes.set_ylabel("validation loss (nats a character)")
        axes.margins(x=0.06, y=0.14)
        axes.grid(axis="x", visible=False)
        seeds = max(map(len, rungs.values()))
        axes.set_title(
            f"from bigrams to a transformer, {rows[0]['steps']:,} steps each, {seeds} seed{'s'[: seeds > 1]}"
        )

    save_figure(draw, path, (7.5, 3.6))

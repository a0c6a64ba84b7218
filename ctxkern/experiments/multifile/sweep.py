"""`ctxkern sweep`: one setting of multi-file training at several values, each with several seeds."""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.data.paths import expand_paths
from ctxkern.experiments.core.files import write_csv_atomic, write_json_atomic
from ctxkern.experiments.core.names import path_to_json, printable
from ctxkern.experiments.core.plots import BLUE, FAINT, ORANGE, save_figure
from ctxkern.experiments.core.runs import RUNS, PlannedRun, add_set_flags, run_set
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.multifile.analysis.families import find_families, read_families
from ctxkern.experiments.multifile.analysis.measures import Neighbours, cosines, numbered, permuted
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import INITS
from ctxkern.experiments.multifile.run import Run, load_run, source_paths

SWEEP = "sweep.json"
_PERMUTATIONS = 200


@dataclass(frozen=True)
class Axis:
    """What is swept: a setting of `TrainConfig`, the values where none are given, and whether a plot has them by
    logarithm."""

    setting: str
    values: tuple
    log: bool = True


AXES = {
    "files": Axis("num_files", (2, 5, 10, 20, 50, 100, 200, 400)),
    "context-dim": Axis("context_dim", (2, 4, 8, 16, 32, 64)),
    "init": Axis("init", INITS, log=False),
    "lr": Axis("lr", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "context-lr-scale": Axis("context_lr_scale", (0.0, 1.0, 3.0, 10.0, 30.0), log=False),
    "bilinear-lr-scale": Axis("bilinear_lr_scale", (0.0, 0.02, 0.0625, 0.25, 1.0), log=False),
    "norm-penalty": Axis("norm_penalty", (0.0, 1.0, 10.0, 100.0, 1000.0), log=False),
    "rank-penalty": Axis("rank_penalty", (0.0, 0.01, 0.1, 1.0, 10.0), log=False),
}


def add_parsers(subparsers: Any) -> None:
    """Register the command."""
    text = "train with one setting at several values: loss, purity of families, time and memory, as CSV and plot"
    parser = subparsers.add_parser(
        "sweep",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Runs that are done are kept: called again, it goes on.",
        epilog="examples:\n  ctxkern sweep files data/arc --values 2,20,200 --seeds 3 --run-dir sweeps/files",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=tuple(AXES), metavar="WHAT", help=f"one of {', '.join(AXES)}")
    parser.add_argument("paths", nargs="+", metavar="PATHS", help="files, folders or glob patterns, as for train")
    parser.add_argument("--values", help="with commas between (default: by WHAT)")
    add_set_flags(parser)
    parser.add_argument("--families", type=Path, metavar="FILE.csv", help="as for report")
    TrainConfig.add_flags(parser)
    parser.set_defaults(run=_sweep, command="sweep")


@dataclass
class _Point:
    value: Any
    seed: int
    run: PlannedRun


def _sweep(args: argparse.Namespace) -> int:
    points: list[_Point] = []

    def plan() -> list[PlannedRun]:
        paths = [Path(os.path.abspath(path)) for path in expand_paths(args.paths)]
        points.extend(_points(args, paths))
        _begin(args, paths)
        return [point.run for point in points]

    found = run_set(plan, args)
    with as_command_errors():
        _write(args, results(points, found, args.run_dir / RUNS, args.families))
    return 0


def _values(args: argparse.Namespace, files: int) -> list:
    axis = AXES[args.what]
    kind = TrainConfig.rules()[axis.setting].kind
    if args.values is None:
        usual = list(axis.values)
        return usual if args.what != "files" else [value for value in usual if value <= files] or [files]
    found = []
    for word in args.values.split(","):
        try:
            found.append(kind(word.strip()))
        except ValueError:
            raise CommandError(
                f"--values has {word!r}; it must be {TrainConfig.rules()[axis.setting].takes()}"
            ) from None
    return list(dict.fromkeys(found))


def _points(args: argparse.Namespace, paths: Sequence[Path]) -> list[_Point]:
    axis, given = AXES[args.what], TrainConfig.given(args)
    if axis.setting in given:
        flag = TrainConfig.flag(axis.setting)
        raise CommandError(f"{flag} is given; it must be left to --values, which are swept")
    points = []
    for value in _values(args, len(paths)):
        for number in range(args.seeds):
            settings = given | {axis.setting: value, "seed": given.get("seed", 0) + number}
            # raises for a value that does not fit
            TrainConfig(**settings)
            if args.what == "files" and value > len(paths):
                raise CommandError(f"--values has {value}; it must be at most {len(paths)}, the number of files")
            name = f"{args.what}-{value}-seed-{settings['seed']}"
            argv = ["train", *map(str, paths), *TrainConfig.arguments(settings), "--quiet", "--no-compare-einsum"]
            points.append(_Point(value, settings["seed"], PlannedRun(name, argv)))
    return points


def _begin(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Make the folder, or see that it holds this sweep."""
    settings = TrainConfig.given(args)
    settings.pop("seed", None)
    stored = {"what": args.what, "settings": settings, "paths": [path_to_json(path) for path in paths]}
    place = args.run_dir / SWEEP
    if place.exists():
        there = json.loads(place.read_text(encoding="utf-8"))
        for name, value in stored.items():
            if there.get(name) != value:
                raise CommandError(
                    f"--run-dir {printable(args.run_dir)} holds a sweep with other {name}; it must be another folder, "
                    "or values and seeds alone may differ"
                )
    args.run_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(place, stored)


def purity(run: Run, paths: Sequence[Path], families: Path | None) -> tuple[float, float] | None:
    """`Neighbours.purity` of the contexts of a run and its mean under permuted families; None where no family is known,
    or all files are of one."""
    names = run.names
    found = read_families(families, names, partly=True) if families else find_families(names, paths)
    if not found.known or len(set(found.names)) == 1:
        return None
    contexts = run.model.contexts().detach().double()
    neighbours = Neighbours(cosines(contexts @ contexts.T), 3)
    null = permuted(neighbours.purity, numbered(found.names), _PERMUTATIONS, generator(0, "purity"))
    return null.observed, null.mean


def results(
    points: Sequence[_Point],
    found: Mapping[str, Mapping[str, Any]],
    folder: Path,
    families: Path | None,
) -> list[dict[str, Any]]:
    """A row for each run, from what `run_all` found in `folder`.

    `validation_loss` is at the step of the lowest mean, and a mean over the files that all runs have, so that runs of
    more files can be compared; `step_ms` is the median of a training step, `peak_mib` the most that the process held.
    """
    losses = [found[point.run.name]["best"] for point in points]
    shared = set.intersection(*({name for name, loss in one.items() if loss is not None} for one in losses))
    rows = []
    for point in points:
        result, run = found[point.run.name], load_run(folder / point.run.name)
        seconds, peak = result["step_seconds"], result["peak_bytes"]
        known = purity(run, source_paths(run.path), families)
        rows.append(
            {
                "value": point.value,
                "seed": point.seed,
                "files_compared": len(shared),
                "validation_loss": sum(result["best"][name] for name in shared) / len(shared) if shared else math.nan,
                "best_step": result["best_step"],
                "steps": result["step"],
                "exact_match": result["observed"].get("exact_match"),
                "purity": known[0] if known else None,
                "purity_permuted": known[1] if known else None,
                "step_ms": None if seconds is None else seconds * 1e3,
                "peak_mib": None if peak is None else peak / 2**20,
                "parameters": result["details"]["parameters"]["total"],
            }
        )
    return rows


def _write(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    write_csv_atomic(args.run_dir / "sweep.csv", rows)
    plot(args.what, rows, args.run_dir / "sweep.png")
    print(_table(args.what, rows))
    for kind, name in (("results", "sweep.csv"), ("plot", "sweep.png")):
        print(f"{kind:<12}{printable(args.run_dir / name)}", flush=True)


_COLUMNS = {
    "loss": ("validation_loss", "validation loss (nats per label)", "{:.4f}"),
    "purity": ("purity", "purity of families", "{:.2f}"),
    "step ms": ("step_ms", "a training step (ms)", "{:.1f}"),
    "peak MiB": ("peak_mib", "peak memory of the process (MiB)", "{:.0f}"),
}


def _means(rows: Sequence[Mapping[str, Any]], column: str) -> dict[Any, list[float]]:
    """The numbers of a column by value, those that are missing left out."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        number = row[column]
        found.setdefault(row["value"], [])
        if number is not None and math.isfinite(number):
            found[row["value"]].append(number)
    return found


def _table(what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds by value."""
    columns = {head: _means(rows, column) for head, (column, _, _) in _COLUMNS.items()}
    lines = [f"{what:>18}" + "".join(f"{head:>12}" for head in columns)]
    for value in columns["loss"]:
        cells = [
            form.format(sum(numbers[value]) / len(numbers[value])) if numbers[value] else "-"
            for numbers, (_, _, form) in zip(columns.values(), _COLUMNS.values(), strict=True)
        ]
        lines.append(f"{value!s:>18}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def plot(what: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each measure against the value: a dot for each seed, a line through the means.

    Args:
        what: of `AXES`.
        rows: of `results`.
        path: the PNG to write.
    """
    shown = {title: _means(rows, column) for column, title, _ in _COLUMNS.values()}
    shown = {title: numbers for title, numbers in shown.items() if any(numbers.values())}
    values = list(next(iter(shown.values())))
    logarithmic = AXES[what].log and len(values) > 1
    places = dict(zip(values, values if logarithmic else range(len(values)), strict=True))

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (title, numbers) in zip(panels, shown.items(), strict=True):
            known = {value: found for value, found in numbers.items() if found}
            xs = [places[value] for value in known]
            axes.plot(xs, [sum(found) / len(found) for found in known.values()], color=BLUE)
            for value, found in known.items():
                axes.scatter([places[value]] * len(found), found, color=ORANGE, s=14, zorder=3)
            if title == _COLUMNS["purity"][1]:
                null = {value: found for value, found in _means(rows, "purity_permuted").items() if found}
                means = [sum(found) / len(found) for found in null.values()]
                axes.plot([places[value] for value in null], means, color=FAINT, label="permuted families")
                axes.legend(loc="best", fontsize=7)
            if logarithmic:
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(list(places.values()), [f"{value}" for value in places])
            if title != _COLUMNS["loss"][1]:
                top = max(number for found in known.values() for number in found)
                axes.set_ylim(0, 1.05 if title == _COLUMNS["purity"][1] else 1.15 * top)
            axes.tick_params(labelsize=7)
            axes.set_title(title, fontsize=8.5)
            axes.set_xlabel(what)

    save_figure(draw, path, (2.9 * len(shown), 2.9))

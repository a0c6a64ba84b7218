"""`ctxkern positional ...`: sweeps, the figures, theory, cross-validation and concentration."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import require_matplotlib
from ctxkern.experiments.positional import figures, results
from ctxkern.experiments.positional.config import (
    ConcentrationSettings,
    CrossSettings,
    CurveSettings,
    MapSettings,
    SweepSettings,
    TaskSettings,
    TheorySettings,
)
from ctxkern.experiments.positional.sweep import PARTS, Row, begin, run_sweep, summarise
from ctxkern.experiments.positional.theory import BRANCHES

_RESUMED = "A command that was stopped or killed goes on where it was when it is given again."
_COMMANDS: dict[str, tuple[type[TaskSettings], str, str]] = {
    "sweep": (
        SweepSettings,
        "train students on a grid of α, ω, λ, initialisation and seed: errors and overlaps as CSV",
        "--run-dir runs/grid --d 500 --omegas 0,0.3 --ridges 0.003,0.01 --inits semantic,random --seeds 4",
    ),
    "figure2": (
        CurveSettings,
        "error gap, test errors and overlaps against α at one ω, with theory, as in Figure 2 of the paper",
        "--run-dir runs/figure2",
    ),
    "figure3": (
        MapSettings,
        "maps over α and ω: error gap, overlaps, gap to the linear baseline, as in Figure 3 of the paper",
        "--run-dir runs/figure3 --d 500",
    ),
    "theory": (
        TheorySettings,
        "the limit of large d: errors and overlaps of both minima, and where they cross",
        "--run-dir runs/theory --omegas 0.2,0.3",
    ),
    "cross-validate": (
        CrossSettings,
        "choose λ by cross-validation, for each α and initialisation",
        "--run-dir runs/ridges --d 500",
    ),
    "concentration": (
        ConcentrationSettings,
        "errors and overlaps at several d: means, and how their spread over seeds falls",
        "--run-dir runs/concentration --seeds 12",
    ),
}


def add_parsers(subparsers: Any) -> None:
    """Register the commands in the group."""
    for name, (settings, text, example) in _COMMANDS.items():
        parser = subparsers.add_parser(
            name,
            usage="%(prog)s --run-dir DIR [options]",
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {_RESUMED}",
            epilog=f"example:\n  ctxkern positional {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--run-dir", type=Path, required=True, help="folder of the parts and of the results")
        parser.add_argument("--quiet", action="store_true", help="no progress bar")
        settings.add_flags(parser)
        parser.set_defaults(run=_run, command=f"positional {name}", kind=name, settings=settings)


def _run(args: argparse.Namespace) -> int:
    for module in ("numpy", "safetensors.torch", "tqdm"):
        require(module)
    require_matplotlib()
    act: Callable[[argparse.Namespace, Any], None] = {
        "sweep": _sweep,
        "figure2": _figure2,
        "figure3": _figure3,
        "theory": _theory,
        "cross-validate": _cross_validate,
        "concentration": _concentration,
    }[args.kind]
    try:
        with as_command_errors():
            act(args, args.settings(**args.settings.given(args)))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", flush=True)
        raise
    return 0


def _swept(args: argparse.Namespace, settings: SweepSettings) -> tuple[list[Row], list[Row]]:
    """(rows, summaries) of the sweep, both written."""
    rows = run_sweep(settings, args.run_dir, kind=args.kind, progress=not args.quiet)
    measured = [*results.MEASURED, *(["held_error"] if settings.folds else [])]
    summaries = summarise(rows, measured)
    write_csv_atomic(args.run_dir / "experiments.csv", rows)
    write_csv_atomic(args.run_dir / "summary.csv", summaries)
    return rows, summaries


def _theory_rows(args: argparse.Namespace, settings: TaskSettings, points: int, rank: int = 1) -> list[Row]:
    """The theory curves, kept in the folder of parts; none where they are not asked for, or do not hold."""
    if points == 0:
        return []
    if rank > 1:
        print(f"theory      left out: it holds for rank 1, and --rank is {rank}")
        return []
    # a repeated run with another number of points has other curves
    folder = args.run_dir / PARTS / f"points-{points}"
    folder.mkdir(parents=True, exist_ok=True)
    total = len(BRANCHES) * len(settings.alpha_values()) * len(settings.omega_values()) * len(settings.ridge_values())
    form = "theory: {l_bar}{bar}| {elapsed} so far, {remaining} to go"
    bar = require("tqdm").tqdm(total=total, disable=True if args.quiet else None, bar_format=form)
    with bar:
        rows = results.theory_rows(settings, points, folder, bar.update)
    write_csv_atomic(args.run_dir / "theory.csv", rows)
    return rows


def _files(args: argparse.Namespace, **names: str) -> None:
    for kind, name in names.items():
        print(f"{kind:<12}{printable(args.run_dir / name)}", flush=True)


def _table(summaries: Sequence[Mapping], columns: Sequence[str]) -> None:
    """Means over seeds on the terminal."""
    places = [name for name in ("d", "alpha", "omega", "ridge") if len({row.get(name) for row in summaries}) > 1]
    heads = "".join(f"{name:>10}" for name in places) + f"{'init':>12}"
    print(heads + "".join(f"{name:>20}" for name in columns))
    for row in summaries:
        cells = []
        for name in columns:
            spread = row.get(f"{name}_sd", math.nan)
            cells.append(f"{row[name]:.5f}" + ("" if math.isnan(spread) else f" ± {spread:.5f}"))
        head = "".join(f"{row[name]:>10g}" for name in places) + f"{row['init']:>12}"
        print(head + "".join(f"{cell:>20}" for cell in cells))


def _sweep(args: argparse.Namespace, settings: SweepSettings) -> None:
    _, summaries = _swept(args, settings)
    held = ["held_error"] if settings.folds else []
    _table(summaries, ["train_error", "test_error", *held, "m", "theta"])
    _files(args, experiments="experiments.csv", summary="summary.csv")


def _say_transitions(
    settings: SweepSettings | TheorySettings, gap_rows: Sequence[Row], theory: Sequence[Row]
) -> list[Row]:
    """Print and give where the gaps change sign, measured and in theory."""
    found = []
    for omega in settings.omega_values():
        row: Row = {"omega": omega}
        for number, (column, name) in enumerate((("gap", "alpha_c"), ("linear_gap", "alpha_l"))):
            if gap_rows:
                place, error = results.transition(gap_rows, column, omega)
                row |= {name: math.nan if place is None else place, f"{name}_error": error}
            if theory:
                limit = results.theory_transitions(theory, omega)[number]
                row[f"{name}_theory"] = math.nan if limit is None else limit
        found.append(row)
    names = list(dict.fromkeys(name for row in found for name in row))
    print("\n" + "".join(f"{name:>16}" for name in names))
    for row in found:
        print("".join(f"{'–' if math.isnan(row[name]) else format(row[name], '.4g'):>16}" for name in names))
    return found


def _figure2(args: argparse.Namespace, settings: CurveSettings) -> None:
    if len(settings.omega_values()) > 1:
        raise CommandError(f"--omegas is {settings.omegas!r}; it must be one number here")
    rows, summaries = _swept(args, settings)
    gap_rows = results.gaps(rows)
    theory = _theory_rows(args, settings, settings.points, settings.rank)
    _table(summaries, ["train_error", "test_error", "m", "theta"])
    transitions = _say_transitions(settings, gap_rows, theory)
    write_csv_atomic(args.run_dir / "gaps.csv", gap_rows)
    write_csv_atomic(args.run_dir / "transitions.csv", transitions)
    figures.plot_curves(summaries, gap_rows, theory, args.run_dir / "figure2.png", settings.d)
    published = results.comparison(settings, summaries)
    if published:
        write_csv_atomic(args.run_dir / "published.csv", published)
        print("\nour means less the published ones, in standard deviations of a published seed:")
        for row in published:
            print(
                f"{row['init']:>12} α = {row['alpha']:<7g}{row['figure']:<12} {row['ours']:.5f} − "
                f"{row['published']:.5f} is {row['deviations']:+.2f} σ"
            )
    _files(args, picture="figure2.png", experiments="experiments.csv", summary="summary.csv", gaps="gaps.csv")


def _figure3(args: argparse.Namespace, settings: MapSettings) -> None:
    rows, _ = _swept(args, settings)
    gap_rows = results.gaps(rows)
    theory = _theory_rows(args, settings, settings.points, settings.rank)
    transitions = _say_transitions(settings, gap_rows, theory)
    write_csv_atomic(args.run_dir / "gaps.csv", gap_rows)
    write_csv_atomic(args.run_dir / "transitions.csv", transitions)
    title = f"d = {settings.d}, {settings.seeds} seeds, λ = {settings.ridges}"
    figures.plot_maps(gap_rows, theory, args.run_dir / "figure3.png", title)
    _files(args, picture="figure3.png", experiments="experiments.csv", gaps="gaps.csv", crossings="transitions.csv")


def _theory(args: argparse.Namespace, settings: TheorySettings) -> None:
    begin(args.run_dir, settings, args.kind)
    theory = _theory_rows(args, settings, settings.points)
    _table(theory, ["train_error", "test_error", "m", "theta"])
    for ridge in settings.ridge_values():
        mine = [row for row in theory if row["ridge"] == ridge]
        print(f"\nλ = {ridge:g}", end="")
        _say_transitions(settings, [], mine)
    figures.plot_theory(theory, args.run_dir / "theory.png")
    _files(args, picture="theory.png", curves="theory.csv")


def _cross_validate(args: argparse.Namespace, settings: CrossSettings) -> None:
    if len(settings.omega_values()) > 1:
        raise CommandError(f"--omegas is {settings.omegas!r}; it must be one number here")
    _, summaries = _swept(args, settings)
    _table(summaries, ["held_error", "test_error", "m", "theta"])
    chosen = []
    for alpha in settings.alpha_values():
        for init in settings.init_values():
            mine = [row for row in summaries if row["alpha"] == alpha and row["init"] == init]
            least, best = (min(mine, key=lambda row: row[name]) for name in ("held_error", "test_error"))
            chosen.append(
                {"alpha": alpha, "init": init, "ridge": least["ridge"], "test_error": least["test_error"]}
                | {"best_ridge": best["ridge"], "best_test_error": best["test_error"]}
            )
    print("\nλ of the least held-out error, and of the least test error:")
    for row in chosen:
        print(
            f"α = {row['alpha']:<5g}{row['init']:>12}: λ = {row['ridge']:g}, test error {row['test_error']:.5f}; "
            f"λ = {row['best_ridge']:g}, test error {row['best_test_error']:.5f}"
        )
    write_csv_atomic(args.run_dir / "chosen.csv", chosen)
    figures.plot_ridges(summaries, args.run_dir / "ridges.png")
    _files(args, picture="ridges.png", summary="summary.csv", chosen="chosen.csv")


def _concentration(args: argparse.Namespace, settings: ConcentrationSettings) -> None:
    for name, instead in (("d", "--widths says which"), ("folds", "nothing is held out here")):
        if name in settings.given(args):
            raise CommandError(f"{settings.flag(name)} is given; it must be left out: {instead}")
    begin(args.run_dir, settings, args.kind)
    values = {name: value for name, value in asdict(settings).items() if name not in ("points", "widths")}
    summaries: list[Row] = []
    for width in settings.width_values():
        one = SweepSettings(**values | {"d": width})
        rows = run_sweep(one, args.run_dir / f"d-{width}", kind="sweep", progress=not args.quiet)
        summaries += [{"d": width} | row for row in summarise(rows, results.MEASURED)]
    write_csv_atomic(args.run_dir / "summary.csv", summaries)
    theory = _theory_rows(args, settings, settings.points, settings.rank)
    _table(summaries, ["train_error", "test_error", "m", "theta"])
    figures.plot_concentration(summaries, theory, args.run_dir / "concentration.png")
    _files(args, picture="concentration.png", summary="summary.csv")

"""`ctxkern report`: what contexts do in trained runs."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ctxkern
from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import remove_leftovers, write_json_atomic, write_text_atomic
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import require_matplotlib
from ctxkern.experiments.multifile.analysis import tables
from ctxkern.experiments.multifile.analysis.analyse import Analysis, analyse
from ctxkern.experiments.multifile.analysis.page import run_page, runs_page
from ctxkern.experiments.multifile.analysis.plots import draw_all, draw_runs
from ctxkern.experiments.multifile.analysis.summary import key_figures, sentences
from ctxkern.experiments.multifile.run import CHECKPOINTS, load_run
from ctxkern.testing.measure import provenance

FOLDER, PAGE, FIGURES = "report", "report.html", "figures.json"
# settings that runs of one setting may differ in
_FREE = ("seed", "device", "num_workers")


def add_parsers(subparsers: Any) -> None:
    """Register the command."""
    text = "what contexts do in a run, and whether files can be told apart: one HTML page, CSV files, pictures"
    parser = subparsers.add_parser("report", help=text, description=f"Shows {text}.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="folders of `ctxkern train`; several must differ in their seed only, and are compared over seeds",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"the page (default: {FOLDER}/{PAGE} in the first RUN)")
    parser.add_argument("--checkpoint", choices=tuple(CHECKPOINTS), default="best", help="(default: best)")
    parser.add_argument(
        "--families", type=Path, metavar="FILE.csv",
        help="columns name and family (default: by folder, first words of the names, or suffix)",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, help="of a file at most, for its losses (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, help="of random draws (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_report, command="report")


def _report(args: argparse.Namespace) -> int:
    for module in ("numpy", "safetensors.torch", "tqdm"):
        require(module)
    require_matplotlib()
    made = {"command": shlex.join(sys.argv), "ctxkern": ctxkern.__version__, **provenance(), "seed": args.seed}
    with as_command_errors():
        if args.windows is not None and args.windows < 1:
            raise CommandError(f"--windows is {args.windows}; it must be at least 1")
        loaded = [load_run(path, checkpoint=args.checkpoint) for path in args.runs]
        _check_one_setting(args.runs, [asdict(run.config) for run in loaded])
        analyses = []
        for run in loaded:
            a = analyse(run, families=args.families, windows=args.windows, seed=args.seed, progress=not args.quiet)
            # each as soon as it is done
            page = args.out if args.out and len(loaded) == 1 else run.path / FOLDER / PAGE
            write_report(a, page, made)
            analyses.append(a)
            print(f"{printable(run.path)}\nfamilies    {a.families.describe()}")
            for line in sentences(a):
                print(f"  {line}")
            for part, reason in a.absent.items():
                print(f"  left out: {part}: {reason}")
            print(f"page        {printable(page)}", flush=True)
        if len(analyses) > 1:
            page = args.out or args.runs[0] / FOLDER / "runs.html"
            _write_runs(analyses, page, made)
            print(f"over runs   {printable(page)}", flush=True)
    return 0


def _check_one_setting(paths: Sequence[Path], configs: Sequence[dict]) -> None:
    """Raise `ValueError` where runs differ in more than the seed, or two are one."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("RUN names one folder twice; each must be another run")
    for path, config in zip(paths, configs, strict=True):
        for name, value in config.items():
            if name not in _FREE and value != configs[0][name]:
                raise ValueError(
                    f"RUN {printable(path)} has {name} {value}; it must be {configs[0][name]}, as in "
                    f"{printable(paths[0])}: runs that are compared differ in their seed only"
                )


def write_report(a: Analysis, page: Path, made: dict) -> None:
    """Pictures, CSV files and `figures.json` in the run's folder `report`, and last the page."""
    folder = a.run.path / FOLDER
    for place in (folder, page.parent):
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
    pictures = draw_all(a, folder)
    parts = [tables.files(a)]
    everything = range(len(a.names))
    for space, name in (("contexts", "cosines_of_contexts"), ("ΔW", "cosines_of_weights")):
        if space in a.similarity:
            parts.append(tables.matrix(name, a, a.similarity[space], everything))
    if a.purities:
        parts.append(tables.purity(a))
    if a.attention:
        parts += [tables.attention(a), tables.matrix("divergences", a, a.attention.pairs, a.attended)]
    if a.swaps:
        parts += [table for table in (tables.swaps(a), tables.exact(a)) if table]
    if a.projections:
        parts.append(tables.projections(a))
    for table in parts:
        table.write(folder)
    write_json_atomic(folder / FIGURES, key_figures(a))
    write_text_atomic(page, run_page(a, pictures, made))


def _write_runs(analyses: Sequence[Analysis], page: Path, made: dict) -> None:
    folder = analyses[0].run.path / FOLDER
    page.parent.mkdir(parents=True, exist_ok=True)
    tables.over_runs(analyses).write(folder)
    picture = folder / "over_runs.png"
    draw_runs([str(a.run.path) for a in analyses], [key_figures(a) for a in analyses], picture)
    write_text_atomic(page, runs_page(analyses, picture, made))

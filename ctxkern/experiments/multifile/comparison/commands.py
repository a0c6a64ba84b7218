"""`ctxkern compare`: many ways to train on the same files, tuned alike, with intervals."""

import argparse
from pathlib import Path
from typing import Any

import ctxkern
from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.data.paths import FoundFiles, find_files, standard_library_files
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import require_matplotlib
from ctxkern.experiments.core.runs import read_result
from ctxkern.experiments.multifile.comparison.arms import ARMS, BASE, equal_width
from ctxkern.experiments.multifile.comparison.plot import plot_differences, plot_positions
from ctxkern.experiments.multifile.comparison.results import summarise, table, write
from ctxkern.experiments.multifile.comparison.study import Study
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.train import prepare
from ctxkern.testing.measure import provenance

_EXAMPLES = """examples:
  ctxkern compare texts/ --run-dir runs/texts-compared --steps 1000 --workers 2
  ctxkern compare bbh/*.json --run-dir runs/bbh-compared --tokens bytes --seeds 5
  ctxkern compare texts/ --run-dir runs/two --arms bilinear,film --no-tune

A command that was stopped or killed goes on where it was when it is given again."""
_LEGEND = """loss: nats per token at the best step of each run, mean over files and seeds. Δ: paired with no context by
file and seed. 95 %: bootstrap over files and their seeds. won: files with a lower loss, mean over seeds.
parameters: of all models of an arm. MiB: of the whole process."""
# settings that are an arm's or the comparison's, not shared
_OWN = ("form", "only", "patience", "rank")


def add_parser(subparsers: Any) -> None:
    """Register `compare`."""
    arms = "".join(f"\n  {name:<14} {arm.text}" for name, arm in ARMS.items())
    parser = subparsers.add_parser(
        "compare",
        usage="%(prog)s [PATHS ...] --run-dir DIR [options]",
        help="compare ways to give a model a context, and models without one, on your files",
        description="Train models on the same files in many ways and say how they differ from one without context, by\n"
        "file and seed, with intervals. The learning rate and the scale of each are tuned on a seed\n"
        f"that is not reported.\n\narms:{arms}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", metavar="PATHS", help="as those of `ctxkern train`")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read")
    group = parser.add_argument_group("comparison")
    group.add_argument("--run-dir", type=Path, required=True, help="folder of all runs and of the results")
    group.add_argument("--arms", default=",".join(ARMS), help="names from the list above, with commas (default: all)")
    group.add_argument("--seeds", type=int, default=3, help="how many, from --seed on (default: 3)")
    group.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    group.add_argument("--tune-steps", type=int, help="of each run that tunes (default: a third of --steps)")
    group.add_argument("--no-tune", action="store_true", help="take learning rate and scales as they are given")
    TrainConfig.add_flags(parser)
    parser.set_defaults(run=run, command="compare")


def run(args: argparse.Namespace) -> int:
    """Run what is not yet there, then write the tables and pictures."""
    require("accelerate")
    require_matplotlib()
    with as_command_errors():
        study = _study(args)
        print(_describe(study), flush=True)
        try:
            study.tune()
            rows = study.run()
        except KeyboardInterrupt:
            print("stopped; the same command goes on", flush=True)
            raise
        results = {row["run"]: read_result(study.folder / row["run"]) or {} for row in rows}
        if not any(row["loss"] is not None for row in rows):
            raise CommandError("no file has anything set apart to compare on; raise --val-fraction")
        summaries = summarise(rows, results)
        write(study.folder, rows, summaries, {"ctxkern": ctxkern.__version__, **provenance()})
        title = f"{len(study.names)} files, {study.seeds} seeds, {study.steps:,} steps"
        plot_differences(summaries, study.folder / "compare.png", title)
        plot_positions(summaries, study.folder / "positions.png", title)
    print(f"\n{table(summaries)}\n")
    print(_LEGEND)
    print(f"\ntables      {printable(study.folder)}/results.csv, table.csv, positions.csv")
    print(f"pictures    {printable(study.folder)}/compare.png, positions.png")
    return 0


def _study(args: argparse.Namespace) -> Study:
    shared = TrainConfig.given(args)
    for name in _OWN:
        if name in shared:
            raise CommandError(f"{TrainConfig.flag(name)} is given; it must be left to the comparison")
    for flag, value, least in (("--seeds", args.seeds, 1), ("--workers", args.workers, 1)):
        if value < least:
            raise CommandError(f"{flag} is {value}; it must be at least {least}")
    arms = list(dict.fromkeys([BASE, *filter(None, args.arms.split(","))]))
    for arm in arms:
        if arm not in ARMS:
            raise CommandError(f"--arms has {arm!r}; it must be of {', '.join(ARMS)}")
    found = find_files(args.paths) if args.paths else FoundFiles(standard_library_files())
    config = TrainConfig(**shared)
    job = prepare(config, found.files, skip_bad=args.skip_bad, bad=found.bad)
    steps = config.training_steps
    tune_steps = max(1, steps // 3) if args.tune_steps is None else args.tune_steps
    if tune_steps < 1:
        raise CommandError(f"--tune-steps is {tune_steps}; it must be at least 1")
    return Study(
        folder=args.run_dir.absolute(),
        paths=[str(path.absolute()) for path, _ in job.sources],
        names=job.dataset.file_names[: len(job.sources)],
        shared=shared,
        arms=arms,
        width=equal_width(config, job.tokenizer.vocab_size, len(job.sources)) if "wider" in arms else config.d_model,
        seeds=args.seeds,
        tune_steps=0 if args.no_tune else tune_steps,
        workers=args.workers,
    )


def _describe(study: Study) -> str:
    runs = study.seeds * sum(len(study.models(arm)) for arm in study.arms)
    width = f"; the wider model has d_model {study.width}" if "wider" in study.arms else ""
    tuned = f"each arm tuned in runs of {study.tune_steps:,} steps" if study.tune_steps else "nothing is tuned"
    return (
        f"arms        {', '.join(study.arms)}{width}\n"
        f"files       {len(study.names)}\n"
        f"runs        {runs} of up to {study.steps:,} steps, {study.seeds} seeds; {tuned}\n"
        f"folder      {printable(study.folder)}\n"
    )

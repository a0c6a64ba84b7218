"""The subcommand of an experiment: its flags, a fresh or resumed run folder, the run, and what it says."""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ctxkern
from ctxkern.experiments.core import processes
from ctxkern.experiments.core.checkpoint import LAST, CheckpointError, read_step
from ctxkern.experiments.core.data.paths import FoundFiles, find_files, fingerprint
from ctxkern.experiments.core.data.reading import BadFilesError
from ctxkern.experiments.core.experiment import Experiment, Inputs, Job, TrainingFile, train
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.loop import FitResult, TrainingError
from ctxkern.experiments.core.memory import is_out_of_memory, peak_bytes
from ctxkern.experiments.core.names import (
    group_notes,
    join_names,
    one_line,
    path_from_json,
    path_to_json,
    printable,
    shell_quote,
)
from ctxkern.experiments.core.plots import plot_losses, require_matplotlib
from ctxkern.experiments.core.runlog import LOGS, METRICS, read_metrics
from ctxkern.experiments.core.settings import RunSettings
from ctxkern.testing.measure import provenance

CONFIG, RESULT, PLOT = "config.json", "result.json", "loss.png"
# left out for one reason
_MOST_NAMES = 20
EXTRAS = ("accelerate", "numpy", "safetensors.torch", "tqdm", "torch.utils.tensorboard")


class CommandError(Exception):
    """The command cannot be done as asked: its message goes to stderr, and the exit status is 2."""


def add_experiment(subparsers: Any, name: str, experiment: Experiment) -> None:
    """Add the subcommand `name` of `experiment` to `subparsers`."""
    epilog = "".join(f"\n  ctxkern {name} {example}".rstrip() for example in experiment.examples)
    parser = subparsers.add_parser(
        name.rpartition(" ")[2],
        usage=f"%(prog)s {'[PATHS ...] ' if experiment.paths_help else ''}[options]",
        help=experiment.help,
        description=experiment.description or experiment.help,
        epilog=f"examples:{epilog}" if epilog else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if experiment.paths_help:
        parser.add_argument("paths", nargs="*", metavar="PATHS", help=experiment.paths_help)
        parser.add_argument(
            "--skip-bad", action="store_true", help="leave out files that cannot be read, instead of stopping"
        )
    if experiment.settings.presets:
        parser.add_argument("--preset", help=f"settings under a name: {', '.join(experiment.settings.presets)}")
    parser.add_argument(
        "--run-dir", type=Path, help=f"folder of the run (default: runs/{name.replace(' ', '-')}-DATE-TIME)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    experiment.add_arguments(parser)
    experiment.settings.add_flags(parser)
    parser.set_defaults(run=run, experiment=experiment, command=name)


def _read_config(name: str, run_dir: Path) -> dict:
    path = run_dir / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        files = [
            TrainingFile(path_from_json(entry["path"]), entry["sha256"], entry.get("of_paths", True))
            for entry in stored["files"]
        ]
        stored = {"train": dict(stored["train"]), "files": files, "experiment": stored.get("experiment", name)}
    except FileNotFoundError:
        raise CommandError(
            f"--resume: {printable(run_dir)} holds no run ({CONFIG} is missing); start it without --resume"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"--resume: {printable(path)} cannot be read: {one_line(repr(error))}") from error
    if stored["experiment"] != name:
        raise CommandError(f"--resume: {printable(run_dir)} holds a run of `ctxkern {stored['experiment']}`")
    return stored


def _check_same_paths(args: argparse.Namespace, files: list[TrainingFile]) -> None:
    where = printable(args.run_dir)
    if getattr(args, "paths", None):
        given = {os.fsencode(os.path.abspath(path)) for path in find_files(args.paths).files}
        if not {os.fsencode(file.path) for file in files if file.of_paths} <= given:
            raise CommandError(f"PATHS: other files than those of the run in {where}; leave them out to resume")
    for file in files:
        if not file.path.is_file():
            raise CommandError(f"--resume: {printable(file.path)} is gone; the run in {where} reads it")
        if fingerprint(file.path) != file.sha256:
            raise CommandError(f"--resume: {printable(file.path)} has changed since the run in {where} began")


def _resumed(args: argparse.Namespace) -> tuple[RunSettings, Inputs, Path]:
    """Settings and files of the run in `--run-dir`, with what may differ taken from the command line."""
    if args.run_dir is None:
        raise CommandError("--resume needs --run-dir, the folder of the run to continue")
    kind, where = args.experiment.settings, printable(args.run_dir)
    stored = _read_config(args.command, args.run_dir)
    settings = stored["train"]
    preset = kind.preset_values(args.preset) if getattr(args, "preset", None) else {}
    for name, value in {**preset, **kind.given(args)}.items():
        if kind.rules()[name].resumable:
            settings[name] = value
        elif settings.get(name) != value:
            there = "left out" if settings.get(name) is None else settings[name]
            raise CommandError(f"{kind.flag(name)} is {value}; it must be {there}, as in the run in {where}")
    _check_same_paths(args, stored["files"])
    config = kind(**settings)
    if (args.run_dir / LAST).exists():
        done = read_step(args.run_dir / LAST)
        if config.training_steps < done:
            flag, steps = kind.flag("training_steps"), config.training_steps
            raise CommandError(f"{flag} is {steps}; it must be at least {done}, the step of the run in {where}")
    found = FoundFiles([file.path for file in stored["files"] if file.of_paths])
    return config, Inputs(found, resumed=args.run_dir), args.run_dir


def _fresh(args: argparse.Namespace) -> tuple[RunSettings, Inputs, Path]:
    """Settings, files and an unused folder."""
    kind, given = args.experiment.settings, args.experiment.settings.given(args)
    config = kind.preset(args.preset, **given) if getattr(args, "preset", None) else kind(**given)
    inputs = Inputs()
    if args.experiment.paths_help:
        found = find_files(args.paths) if args.paths else FoundFiles(args.experiment.default_paths())
        # not resolved: the suffix of a symbolic link says how to read it
        found.files = [Path(os.path.abspath(path)) for path in found.files]
        inputs = Inputs(found, args.skip_bad)
    run_dir = args.run_dir or Path("runs", time.strftime(f"{args.command.replace(' ', '-')}-%Y%m%d-%H%M%S"))
    if (run_dir / CONFIG).exists() or (run_dir / LAST).exists():
        raise CommandError(
            f"--run-dir: {printable(run_dir)} already holds a run; add --resume to continue it, or name another folder"
        )
    return config, inputs, run_dir


@contextlib.contextmanager
def as_command_errors() -> Iterator[None]:
    """Wrong settings and files as `CommandError`."""
    try:
        yield
    except BadFilesError as error:
        raise CommandError(str(error)) from error
    except (ValueError, TypeError, OSError, CheckpointError, TrainingError) as error:
        raise CommandError(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CommandError(f"memory ran out: {one_line(error)}") from error


def run(args: argparse.Namespace) -> int:
    """Run the experiment as `args` say; 0, or 128 + the signal that stopped it.

    Raises:
        CommandError: settings or files that do not fit.
        MissingExtraError: a package is missing; said before the work, not after it.
    """
    for module in EXTRAS:
        require(module)
    require_matplotlib()
    experiment = args.experiment
    with as_command_errors():
        config, inputs, run_dir = _resumed(args) if args.resume else _fresh(args)
        job = experiment.prepare(config, inputs)
        files = experiment.files(job)
        processes.join(config.torch_device())
        # no folder is written to before all processes have seen that it is unused
        run_dir = processes.from_main(run_dir)
        if processes.is_main():
            _write_start(args, job, files, run_dir)
        experiment.start(job, run_dir)
    say = print if processes.is_main() else _silent
    say(experiment.describe(job))
    for reason, names in group_notes(inputs.found.notes).items():
        say(f"left out    {join_names(names, _MOST_NAMES)}: {reason}")
    say(f"run         {printable(run_dir)}\n", flush=True)
    with as_command_errors():
        digests = [file.sha256 for file in files]
        result = train(
            job, run_dir, resume=args.resume, progress=not args.quiet, config={"files": digests} if files else None
        )
        if processes.is_main():
            _write_result(run_dir, result, experiment.details(job))
    if not processes.is_main():
        return 128 + result.interrupted if result.interrupted else 0
    return _finish(args, job, run_dir, result)


def _silent(*_: object, **__: object) -> None:
    """`print` in the processes that are not the main one."""


def _write_start(args: argparse.Namespace, job: Job, files: list[TrainingFile], run_dir: Path) -> None:
    """What a run folder holds before the training."""
    run_dir.mkdir(parents=True, exist_ok=True)
    args.experiment.save(job, run_dir)
    # last: a folder with it can be resumed
    write_json_atomic(
        run_dir / CONFIG,
        {
            "experiment": args.command,
            "train": asdict(job.config),
            "files": [
                {"path": path_to_json(file.path), "sha256": file.sha256, "of_paths": file.of_paths} for file in files
            ],
            "started": {"command": shlex.join(sys.argv), "ctxkern": ctxkern.__version__, **provenance()},
        },
    )


def _write_result(run_dir: Path, result: FitResult, details: Mapping[str, Any]) -> None:
    """The run's last numbers as `result.json`; nan, which JSON has not, as null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(one) for name, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    values = finite(asdict(result)) | {"interrupted": result.interrupted.name if result.interrupted else None}
    write_json_atomic(run_dir / RESULT, values | {"peak_bytes": peak_bytes(), "details": finite(details)})


def _plot(args: argparse.Namespace, job: Job, run_dir: Path) -> bool:
    """Whether the loss plot was drawn. Every number is on the disk already, so a failure is a warning."""
    try:
        baseline = getattr(args, "baseline", None)
        known = read_metrics(baseline) if baseline else []
        plot_losses(read_metrics(run_dir), run_dir / PLOT, title=args.experiment.title(job), baseline=known)
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        print(f"ctxkern {args.command}: warning: no plot was drawn: {reason}", file=sys.stderr, flush=True)
        return False
    return True


def _finish(args: argparse.Namespace, job: Job, run_dir: Path, result: FitResult) -> int:
    if result.interrupted:
        print(
            f"\nstopped at step {result.step} of {result.steps} by {result.interrupted.name}; continue with:\n"
            f"  ctxkern {args.command} --resume --run-dir {shell_quote(run_dir)}",
            flush=True,
        )
        _plot(args, job, run_dir)
        return 128 + result.interrupted
    if result.ended:
        print(f"\nended at step {result.step} of {result.steps}: {result.ended}")
    report = args.experiment.report(job, result)
    if report:
        print(f"\n{report}")
    if result.best_step not in (None, result.step):
        print(f"the mean was lowest at step {result.best_step}: {result.best_loss:.4f}")
    best = "" if result.best_step is None else f", best.safetensors (step {result.best_step})"
    print(f"\ncheckpoints {printable(run_dir / LAST)}{best}")
    print(f"result      {printable(run_dir / RESULT)}")
    board = job.config.tensorboard_dir or run_dir / LOGS
    print(f"logs        {printable(run_dir / METRICS)}; tensorboard --logdir {shell_quote(board)}", flush=True)
    if _plot(args, job, run_dir):
        print(f"plot        {printable(run_dir / PLOT)}", flush=True)
    if processes.is_sharded(job.model):
        print("what is done after a run is left out: the model is sharded", flush=True)
    else:
        args.experiment.finish(job, args)
    return 0

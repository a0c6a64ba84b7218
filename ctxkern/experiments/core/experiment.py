"""What an experiment is: settings, a job built from them, and how the job is trained.

A package makes an experiment with a `RunSettings` dataclass and a subclass of `Experiment`; one line in
`ctxkern.experiments.EXPERIMENTS` makes it a subcommand, with its flags, help, run folder and resume. The smallest one
is in `tests/experiments/test_new_experiment.py`.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ctxkern.experiments.core.batches import Batch, BatchSource, count_rows
from ctxkern.experiments.core.data.paths import FoundFiles
from ctxkern.experiments.core.loop import FitResult, LoopConfig, fit
from ctxkern.experiments.core.schedule import warmup_cosine
from ctxkern.experiments.core.settings import RunSettings

Evaluate = Callable[[Any], Mapping[str, float]]


class Job(Protocol):
    """What is trained.

    A job may also have `weigh(batch)`, `before_step(step)` and `observe(model)`, see `fit`, and `steers`, whether it
    clips gradients and schedules learning rates itself.
    """

    @property
    def config(self) -> RunSettings:
        """The settings."""

    @property
    def model(self) -> nn.Module:
        """On its device, ready to train."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the model's parameters."""

    def batches(self) -> BatchSource | Callable[[int], Batch]:
        """The batches, see `fit`."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The scalar to minimise."""

    def evaluator(self) -> Evaluate | None:
        """The validation losses of a model by name, or None where there is nothing to validate on."""


@dataclass
class TrainingFile:
    """A file that a run reads, as the run's `config.json` records it: one of PATHS, or one that a setting names."""

    path: Path
    sha256: str
    of_paths: bool = True


@dataclass
class Inputs:
    """What the command line says beyond the settings: files, whether bad ones are left out, the run that goes on."""

    found: FoundFiles = field(default_factory=FoundFiles)
    skip_bad: bool = False
    resumed: Path | None = None


class Experiment:
    """One subcommand of `ctxkern`. A subclass sets `settings` and `help`, and defines `prepare`.

    Attributes:
        settings: the dataclass of its settings.
        help: one line for the list of commands.
        description: for its own `--help`; `help` where empty.
        examples: command lines after `ctxkern NAME`, for its own `--help`.
        paths_help: what the positional PATHS are; empty where it reads no files.
    """

    settings: ClassVar[type[RunSettings]]
    help: ClassVar[str]
    description: ClassVar[str] = ""
    examples: ClassVar[Sequence[str]] = ()
    paths_help: ClassVar[str] = ""

    def prepare(self, config: Any, inputs: Inputs) -> Job:
        """Build the job.

        Raises:
            OSError, TypeError, ValueError: settings or files that do not fit; the message is shown in one line.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare(config, inputs)")

    def default_paths(self) -> list[Path]:
        """The files to use where none are named.

        Raises:
            ValueError: it needs some.
        """
        raise ValueError("PATHS is empty; it must name at least one file")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add flags that are not settings of the run."""

    def files(self, job: Any) -> list[TrainingFile]:
        """The files that the job trains on: a resumed run insists on the same contents."""
        return []

    def save(self, job: Any, run_dir: Path) -> None:
        """Write what the run folder holds besides settings, logs and checkpoints, such as a tokenizer."""

    def start(self, job: Any, run_dir: Path) -> None:
        """Tell the job its run folder, in every process."""

    def describe(self, job: Any) -> str:
        """What to print before the training."""
        return f"parameters  {sum(parameter.numel() for parameter in job.model.parameters()):,}"

    def title(self, job: Any) -> str:
        """The title of the loss plot."""
        return ""

    def report(self, job: Any, result: FitResult) -> str:
        """What to print after the training."""
        before, after = (_mean(losses) for losses in (result.first, result.last))
        return f"mean validation loss: {before:.4f} at step 0, {after:.4f} at step {result.step}" if result.last else ""

    def details(self, job: Any) -> Mapping[str, Any]:
        """What `result.json` has in addition to a `FitResult`: values of JSON, nan for what is not known."""
        return {}

    def finish(self, job: Any, args: argparse.Namespace) -> None:
        """Do what remains once numbers and plot are on the disk."""


def _mean(losses: Mapping[str, float]) -> float:
    known = [loss for loss in losses.values() if math.isfinite(loss)]
    return sum(known) / len(known) if known else math.nan


def train(
    job: Job, run_dir: str | Path, *, resume: bool = False, progress: bool = True, config: Mapping | None = None
) -> FitResult:
    """Run `job` with `ctxkern.experiments.core.loop.fit`, as its settings say.

    Args:
        job: what to train.
        run_dir: folder of logs and checkpoints.
        resume: continue from the last checkpoint in it.
        progress: show a progress bar.
        config: more that a checkpoint must agree with, such as the files' checksums.

    Raises:
        CheckpointError, TrainingError: as `fit`.
    """
    settings, steers = job.config, getattr(job, "steers", False)
    steps = settings.training_steps
    tenth = max(1, steps // 10)
    loop = LoopConfig(
        steps=steps,
        run_dir=run_dir,
        seed=settings.seed,
        grad_clip=None if steers else settings.grad_clip or None,
        accumulate=settings.accumulate,
        log_every=settings.log_every,
        board=Path(settings.tensorboard_dir) if settings.tensorboard_dir else None,
        eval_every=settings.eval_every or tenth,
        checkpoint_every=settings.checkpoint_every or tenth,
        patience=settings.patience or None,
        min_improvement=settings.min_improvement,
        plateau_patience=settings.plateau_patience if settings.schedule == "plateau" and not steers else None,
        plateau_factor=settings.plateau_factor,
        max_minutes=settings.max_minutes,
        config={**settings.fixed(), **(config or {})},
        resume=resume,
        progress=progress,
    )

    def lr_factor(step: int) -> float:
        if steers:
            return 1.0
        if settings.schedule != "cosine":
            return min(1.0, (step + 1) / max(1, settings.warmup_steps))
        return warmup_cosine(step, steps, settings.warmup_steps)

    return fit(
        job.model,
        job.optimizer,
        job.batches(),
        loop,
        loss_fn=job.loss,
        evaluate=job.evaluator(),
        lr_factor=lr_factor,
        weigh=getattr(job, "weigh", count_rows),
        before_step=getattr(job, "before_step", None),
        observe=getattr(job, "observe", None),
    )

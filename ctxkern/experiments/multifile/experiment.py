"""`ctxkern train`: one model on many files, each with its context."""

import argparse
import math
from pathlib import Path
from typing import Any, ClassVar

from ctxkern.experiments.core.data.paths import standard_library_files
from ctxkern.experiments.core.experiment import Experiment, Inputs, TrainingFile
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.loop import FitResult
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.runlog import METRICS
from ctxkern.experiments.core.tokenizers import save_tokenizer
from ctxkern.experiments.multifile import report
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.costs import step_costs
from ctxkern.experiments.multifile.run import NAMES, TOKENIZER
from ctxkern.experiments.multifile.train import EXACT, Job, majority_shares, prepare

_COMPARED_STEPS = 7


def _run_folder(text: str) -> Path:
    if not (Path(text) / METRICS).is_file():
        raise argparse.ArgumentTypeError(
            f"it is {printable(text)}; it must be the folder of a run ({METRICS} is missing)"
        )
    return Path(text)


class MultiFileTraining(Experiment):
    """One transformer on many files at once, each with a context vector."""

    settings = TrainConfig
    help = "train one model on many files, each with its own context"
    description = (
        "Train one transformer on many files at once. Each file has a learned context vector that\n"
        "modulates the attention weights. Writes checkpoints, logs and a loss plot to the run folder."
    )
    examples: ClassVar = (
        "",
        "texts/ --steps 1000 --run-dir runs/texts",
        "tasks/*.json --skip-bad --balanced --tokens bytes",
        "--resume --run-dir runs/texts --steps 2000",
    )
    paths_help = (
        "files, folders or glob patterns: ARC tasks, BIG-Bench JSON, JSON lists, jsonl, any text "
        "(default: sources of the Python standard library)"
    )

    def default_paths(self) -> list[Path]:
        return standard_library_files()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--compare-einsum",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="at the end, measure a training step without context, with ctxkern and with the einsum (default: yes)",
        )

        parser.add_argument(
            "--baseline",
            type=_run_folder,
            metavar="RUN",
            help="a run without context (--form none) on the same files, whose losses the plot shows as lines",
        )

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Job:
        return prepare(config, inputs.found.files, skip_bad=inputs.skip_bad, bad=inputs.found.bad)

    def files(self, job: Job) -> list[TrainingFile]:
        return [TrainingFile(*source) for source in job.sources]

    def save(self, job: Job, run_dir: Path) -> None:
        save_tokenizer(job.tokenizer, run_dir / TOKENIZER)
        write_json_atomic(run_dir / NAMES, job.dataset.file_names)

    def describe(self, job: Job) -> str:
        return report.describe(job)

    def title(self, job: Job) -> str:
        config = job.config
        form = f"K {config.context_dim}" if config.form == "bilinear" else config.form
        return f"{job.dataset.num_files} files, d_model {config.d_model}, {config.n_layers} layers, {form}"

    def report(self, job: Job, result: FitResult) -> str:
        at = result.step if result.best_step is None else result.best_step
        heading = f"validation loss (nats per token), step 0 and step {at}, the lowest mean:\n"
        if not result.first:
            return f"{heading}no file has any set apart"
        names = job.dataset.file_names[: len(job.dataset.file_paths)]
        windows = dict.fromkeys(names, 0)
        for file_id in job.train_data.file_ids:
            if file_id < len(names):
                windows[names[file_id]] += 1
        shares = {name: result.observed.get(f"{EXACT}/{name}", math.nan) for name in names}
        return heading + report.loss_table(result.first, result.best, windows, shares, majority_shares(job.dataset))

    def details(self, job: Job) -> dict[str, Any]:
        """Parameters by kind, and by file the share of its most frequent answer."""
        return {"parameters": job.model.parameter_counts(), "majority": majority_shares(job.dataset)}

    def finish(self, job: Job, args: argparse.Namespace) -> None:
        if args.compare_einsum and job.config.attention == "fused" and job.config.form == "bilinear":
            costs = step_costs(job, steps=_COMPARED_STEPS)
            print(f"cost        {report.cost_lines(costs, _COMPARED_STEPS)}")

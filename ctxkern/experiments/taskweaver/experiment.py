"""`ctxkern taskweaver train`: a hypernetwork that writes LoRA weights from the prompt."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import ctxkern
from ctxkern.experiments.core.data.paths import fingerprint
from ctxkern.experiments.core.experiment import Experiment, Inputs, TrainingFile
from ctxkern.experiments.core.loop import FitResult
from ctxkern.experiments.core.names import join_names, printable
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.taskweaver.commands import MODEL
from ctxkern.experiments.taskweaver.config import TaskWeaverSettings
from ctxkern.experiments.taskweaver.hypernetwork import parameter_counts
from ctxkern.experiments.taskweaver.measure import TrainedWeaver
from ctxkern.experiments.taskweaver.training import TaskWeaverJob


class TaskWeaverTraining(Experiment):
    """A hypernetwork on one frozen language model."""

    settings = TaskWeaverSettings
    help = "train a hypernetwork that writes LoRA weights for a language model from the prompt"
    description = (
        "Train a hypernetwork on a frozen causal language model of transformers: from the embedding of a prompt it\n"
        "writes LoRA weights, in which the model answers. --dataset_config is a JSON list of datasets, // comments\n"
        'allowed: [{"name": "gsm8k", "dataset_path": "FILE, FOLDER OR NAME ON THE HUB", "dataset_config": "main",\n'
        '"split": "train", "num_samples": 1000}]; the name is that of a processor: gsm8k, svamp, bbh, or pairs for\n'
        "records with the keys that ctxkern train knows. Flags may have dashes in place of underscores."
    )
    examples: ClassVar = (
        "--use_default_dataset",
        "--model_name HuggingFaceTB/SmolLM2-135M --lora_target_layers q_proj,v_proj --dataset_config tasks.json",
        "--resume --output_dir output",
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            "--output-dir",
            dest="run_dir",
            type=Path,
            default=argparse.SUPPRESS,
            help="the same as --run-dir; the trained model is in its folder model",
        )

    def prepare(self, config: TaskWeaverSettings, inputs: Inputs) -> TaskWeaverJob:
        return TaskWeaverJob(config)

    def start(self, job: TaskWeaverJob, run_dir: Path) -> None:
        job.run_dir = run_dir

    def files(self, job: TaskWeaverJob) -> list[TrainingFile]:
        own = [Path(job.config.dataset_config).absolute()] if job.config.dataset_config else []
        return [TrainingFile(path, fingerprint(path)) for path in (*own, *job.dataset.files)]

    def describe(self, job: TaskWeaverJob) -> str:
        dataset = job.dataset
        validated = sum(map(len, job.chosen.values()))
        return "\n".join(
            (
                f"datasets    {len(dataset.names)}: {join_names(dataset.names, 20)}",
                f"examples    {len(dataset):,}, {len(job.train):,} to train on and {validated:,} for validation; "
                f"{len(job.sampler):,} batches of {job.sampler.batch_size} are an epoch",
                *(f"cut         {name}: {note}, to fit --max_length" for name, note in dataset.notes),
                *_trained(job),
                f"model       {printable(job.config.model_name)} on {job.model.lm.device}",
            )
        )

    def title(self, job: TaskWeaverJob) -> str:
        return f"TaskWeaver on {len(job.dataset.names)} datasets"

    def report(self, job: TaskWeaverJob, result: FitResult) -> str:
        # a resumed run has the first ones from its log
        logged = [row["observed"] for row in read_metrics(job.run_dir or "") if "observed" in row]
        first, last = (logged[0], logged[-1]) if logged else ({}, {})
        width = max(map(len, ("dataset", *job.dataset.names)))
        lines = [f"validation, before and after:\n{'dataset':<{width}}  {'nats per token':>16}  token accuracy"]
        for name in job.dataset.names:
            losses = [side.get(name, math.nan) for side in (result.first, result.last)]
            shares = [side.get(f"token_accuracy/{name}", math.nan) for side in (first, last)]
            lines.append(f"{name:<{width}}  {losses[0]:>7.4f}  {losses[1]:>7.4f}  {shares[0]:>6.3f}  {shares[1]:>6.3f}")
        return "\n".join(lines)

    def details(self, job: TaskWeaverJob) -> Mapping[str, Any]:
        return {"token_accuracy": job.accuracies, "trainable": parameter_counts(job.model)["trainable"]}

    def finish(self, job: TaskWeaverJob, args: argparse.Namespace) -> None:
        if job.run_dir is None:
            return
        place, model = job.run_dir / MODEL, job.model
        if isinstance(model, TrainedWeaver):
            model.weaver.save_pretrained(place)
            job.tokenizer.save(place)
            print(f"model       {printable(place)}, for TaskWeaver.from_pretrained and ctxkern taskweaver")
        else:
            ctxkern.save_attached(model.lm, place)
            print(f"adapters    {printable(place)}, for ctxkern.load_attached")


def _trained(job: TaskWeaverJob) -> list[str]:
    """What is trained, for `describe`."""
    counts, model = parameter_counts(job.model), job.model
    said = f"parameters  {counts['trainable']:,} trained of {counts['total']:,}, "
    if not isinstance(model, TrainedWeaver):
        assert job.bank is not None
        count = job.bank.count
        each = "one adapter that all share" if count == 1 else f"{count} adapters, one a dataset"
        return [f"{said}{each}, of rank {job.bank.rank} for {len(job.bank.targets)} layers"]
    most, weaver = job.config.cached_prompts, model.weaver
    size = most * weaver.project.in_features * 4 / 2**20
    return [
        f"prompts     embedded once each; at most {most:,} are kept, {size:,.0f} MiB",
        f"{said}which write rank {job.config.lora_rank} for {len(weaver.targets)} layers",
    ]

"""`ctxkern adapters train`: many adapters on one frozen language model, in mixed batches."""

import argparse
from pathlib import Path
from typing import ClassVar

from ctxkern.experiments.adapters.config import AdapterSettings
from ctxkern.experiments.adapters.roster import FAILED, RETIRED
from ctxkern.experiments.adapters.train import EXPORTED, ROSTER, AdapterJob
from ctxkern.experiments.core.experiment import Experiment, Inputs
from ctxkern.experiments.core.loop import FitResult
from ctxkern.experiments.core.names import join_names, printable

_MOST_NAMES = 20


class AdapterTraining(Experiment):
    """A bank of LoRA adapters on one frozen language model, each as if it trained alone."""

    settings = AdapterSettings
    help = "train many LoRA adapters together on one frozen language model"
    description = (
        "Train one LoRA adapter for each file or folder of --data on a frozen causal language model of transformers.\n"
        "A step mixes sequences of many adapters; each has its own learning rate, steps, data order and validation,\n"
        'and ends as if it had trained alone. DATA/adapters.json may give some their own: {"name": {"lr": 1e-3,\n'
        '"steps": 300}}. Adapters are added and retired while the run trains (ctxkern adapters add, retire) and\n'
        "written in PEFT's format at the end."
    )
    examples: ClassVar = (
        "--model HuggingFaceTB/SmolLM2-135M --data tasks/ --rank 8 --steps 300 --run-dir runs/bank",
        "--resume --run-dir runs/bank --steps 600",
    )

    def prepare(self, config: AdapterSettings, inputs: Inputs) -> AdapterJob:
        return AdapterJob(config, inputs.resumed)

    def start(self, job: AdapterJob, run_dir: Path) -> None:
        job.run_dir = run_dir
        job.write_roster()

    def save(self, job: AdapterJob, run_dir: Path) -> None:
        job.tokenizer.save(run_dir / "tokenizer")

    def describe(self, job: AdapterJob) -> str:
        trained = sum(parameter.numel() for parameter in job.model.banks())
        frozen = sum(parameter.numel() for parameter in job.model.parameters()) - trained
        names = [member.name for member in job.roster.present()]
        each = trained // job.roster.slots
        return "\n".join(
            (
                f"adapters    {len(names)}: {join_names(names, _MOST_NAMES)}",
                f"bank        {job.roster.slots} rows of rank {job.config.rank} on {len(job.model.names)} layers, "
                f"{each:,} parameters each",
                f"model       {printable(job.config.model)}, {frozen:,} frozen parameters in {job.config.dtype} on "
                f"{job.model.lm.device}",
            )
        )

    def title(self, job: AdapterJob) -> str:
        return f"{len(job.data)} adapters of rank {job.config.rank}"

    def report(self, job: AdapterJob, result: FitResult) -> str:
        width = max(map(len, job.roster.members), default=0)
        lines = [f"validation loss (nats per token):\n{'adapter':<{width}}   steps   before    after"]
        for member in job.roster.members.values():
            before, after = (losses.get(member.name, float("nan")) for losses in (result.first, result.last))
            note = f"   {member.state}" if member.state in (FAILED, RETIRED) else ""
            lines.append(f"{member.name:<{width}}  {member.done:>6}  {before:>7.4f}  {after:>7.4f}{note}")
        return "\n".join(lines)

    def finish(self, job: AdapterJob, args: argparse.Namespace) -> None:
        job.write_roster()
        for member in job.roster.present():
            if member.state != FAILED:
                job.export(member)
        if job.run_dir is not None:
            print(
                f"adapters    {printable(job.run_dir / EXPORTED)}, in PEFT's format; {printable(job.run_dir / ROSTER)}"
            )

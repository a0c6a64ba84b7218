"""`ctxkern gpt train`: a GPT on the characters of texts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ctxkern.experiments.core import processes
from ctxkern.experiments.core.data.paths import fingerprint, standard_library_files
from ctxkern.experiments.core.experiment import Experiment, Inputs, TrainingFile
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.loop import FitResult
from ctxkern.experiments.core.names import group_notes, join_names
from ctxkern.experiments.gpt.config import GPTSettings
from ctxkern.experiments.gpt.train import NAMES, VOCAB, CharJob, prepare

_MOST_NAMES = 12
_NORMS = {"pre": "pre-norm", "post": "post-norm", "none": "no norms"}


class CharTraining(Experiment):
    """What trainings on characters of texts share."""

    paths_help = "texts in UTF-8: files, folders or glob patterns (default: sources of the Python standard library)"

    def default_paths(self) -> list[Path]:
        return standard_library_files()

    def files(self, job: CharJob) -> list[TrainingFile]:
        number = len(job.data.names)
        return [
            TrainingFile(file.path, fingerprint(file.path), of_paths=i < number)
            for i, file in enumerate(job.data.files)
        ]

    def save(self, job: CharJob, run_dir: Path) -> None:
        job.data.tokenizer.write(run_dir / VOCAB)
        write_json_atomic(run_dir / NAMES, job.data.names)

    def describe(self, job: CharJob) -> str:
        data = job.data
        sizes = [sum(map(len, data.spans[split])) for split in ("train", "validation")]
        return "\n".join(
            (
                f"texts       {len(data.names)}: {join_names(data.names, _MOST_NAMES)}",
                f"bytes       {sizes[0]:,} to train on, {sizes[1]:,} for validation",
                f"vocabulary  {data.tokenizer.vocab_size} characters",
                *(f"note        {join_names(names)}: {note}" for note, names in group_notes(data.notes).items()),
                f"parameters  {_parameters(job):,}",
            )
        )

    def report(self, job: CharJob, result: FitResult) -> str:
        if not result.last:
            return ""
        width = max(map(len, ("text", *job.data.validated)))
        lines = [
            "validation loss, nats a character: estimates before and after, and of the whole text\n"
            f"{'text':<{width}}   before    after    whole"
        ]
        for name in job.data.validated:
            losses = [side.get(name, math.nan) for side in (result.first, result.last, job.whole)]
            lines.append(f"{name:<{width}}" + "".join(f"  {loss:>7.4f}" for loss in losses))
        most = job.config.final_characters
        if max(job.data.sizes["validation"]) > most:
            lines.append(f"whole: of the first {most:,} characters at most (--final-characters)")
        return "\n".join(lines)

    def details(self, job: CharJob) -> Mapping[str, Any]:
        """Sizes, and the loss of each whole validation text at the last step, which a sharded model cannot say here."""
        job.whole = {} if processes.is_sharded(job.model) else job.whole_losses(job.model)
        return {
            "parameters": _parameters(job),
            "vocabulary": job.data.tokenizer.vocab_size,
            "whole": job.whole,
        }


def _parameters(job: CharJob) -> int:
    return sum(parameter.numel() for parameter in job.model.parameters())


class GPTTraining(CharTraining):
    """A GPT on characters."""

    settings = GPTSettings
    help = "train a GPT on the characters of texts, each with a context if wanted"
    description = (
        "Train a GPT on random windows of texts, which are memory-mapped and may be of any size. The defaults are\n"
        "the sizes of nanoGPT for a CPU; --preset document has eight layers of width 512, post-norm. With\n"
        "--context-dim each text has a learned vector that modulates attention."
    )
    examples: ClassVar = (
        "",
        "shakespeare.txt --run-dir runs/shakespeare",
        "train.txt --val-file val.txt --vocab vocab.txt --preset document",
        "texts/*.txt --context-dim 16 --n-layer 6 --steps 5000",
        "--resume --run-dir runs/shakespeare --steps 4000",
    )

    def prepare(self, config: GPTSettings, inputs: Inputs) -> CharJob:
        return prepare(config, inputs)

    def title(self, job: CharJob) -> str:
        c = job.config
        contexts = f", contexts of {c.context_dim}" if c.context_dim else ""
        texts = job.data.names
        what = texts[0] if len(texts) == 1 else f"{len(texts)} texts"
        return f"GPT on {what}, {c.n_layers} layers of width {c.d_model}, {_NORMS[c.norm]}{contexts}"

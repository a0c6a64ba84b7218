"""The runs of a comparison, and what each is worth on the examples that it did not see."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import ctxkern
from ctxkern.experiments.core.data.paths import fingerprint
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.hub import load_language_model
from ctxkern.experiments.core.runs import PlannedRun, run_all
from ctxkern.experiments.taskweaver.adapters import TrainedAdapters
from ctxkern.experiments.taskweaver.commands import MODEL
from ctxkern.experiments.taskweaver.config import DATASET, PROMPT, SHARED, WEIGHTS, TaskWeaverSettings
from ctxkern.experiments.taskweaver.configs import DatasetConfig
from ctxkern.experiments.taskweaver.data import TaskDataset, create_dataset
from ctxkern.experiments.taskweaver.evaluation import Arm, evaluate, few_shot_arm, prompt_arms, spread
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver
from ctxkern.experiments.taskweaver.sources import local_files

# of the seeds that are reported, far from this one
_TUNING_SEED = 1000
TRAINED, HELD_OUT = "trained", "held out"
NAMES = {SHARED: "shared adapter", DATASET: "adapter a dataset"}


@dataclass
class Measure:
    """How runs are measured: examples of each dataset, answered ones before a prompt, tokens of an answer, batch."""

    examples: int
    shots: int
    max_new_tokens: int | None
    batch_size: int


@dataclass
class Study:
    """What is compared, and how.

    Attributes:
        folder: of all runs.
        shared: settings of all runs.
        held_out: datasets that no run is trained on.
        seeds: how many.
        rates: learning rates that each way of training tries, of `WEIGHTS`.
        tune_steps: of a run that tries one.
        measure: how runs are measured.
        workers: runs at a time.
    """

    folder: Path
    shared: Mapping[str, Any]
    held_out: Sequence[DatasetConfig]
    seeds: int
    rates: Mapping[str, Sequence[float]]
    tune_steps: int
    measure: Measure
    workers: int
    tuned: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = TaskWeaverSettings(**self.shared)
        self.tuned = {weights: rates[0] for weights, rates in self.rates.items()}

    def _planned(self, name: str, **changes: Any) -> PlannedRun:
        flags = TaskWeaverSettings.arguments({**self.shared, **changes})
        return PlannedRun(name, ["taskweaver", "train", *flags, "--quiet"])

    def tune(self) -> None:
        """Choose the learning rate of each way that tries several, by the mean validation loss at a seed that is not
        reported."""
        seed = self.config.seed + _TUNING_SEED
        tried = {weights: rates for weights, rates in self.rates.items() if len(rates) > 1}
        names = {(weights, rate): f"tune-{weights}-{rate:g}" for weights, rates in tried.items() for rate in rates}
        runs = [
            self._planned(name, weights=weights, learning_rate=rate, seed=seed, training_steps=self.tune_steps)
            for (weights, rate), name in names.items()
        ]
        results = run_all(runs, self.folder, workers=self.workers) if runs else {}
        for weights, rates in tried.items():
            losses = [_mean(results[names[weights, rate]]["last"].values()) for rate in rates]
            self.tuned[weights] = rates[losses.index(min(losses))]

    def train(self) -> dict[tuple[str, int], dict[str, Any]]:
        """`result.json` of each way and seed, with the name of its run."""
        names = {
            (weights, seed): f"{weights}-seed{seed}"
            for seed in range(self.config.seed, self.config.seed + self.seeds)
            for weights in WEIGHTS
        }
        runs = [
            self._planned(name, weights=weights, seed=seed, learning_rate=self.tuned[weights])
            for (weights, seed), name in names.items()
        ]
        results = run_all(runs, self.folder, workers=self.workers)
        return {key: results[name] | {"run": name} for key, name in names.items()}

    def evaluate(self, report: Callable[[str, int, int], None] = lambda *done: None) -> list[dict[str, Any]]:
        """A row for each seed, dataset and arm; what a run is worth is kept in its folder.

        Args:
            report: called with a run's name, and how many of how many examples are done.
        """
        held_out = [[repr(one), *map(fingerprint, local_files(one))] for one in self.held_out]
        known = json.dumps([vars(self.measure), held_out])
        key, rows = sha256(known.encode()).hexdigest()[:12], []
        loaded: _Loaded | None = None
        for seed in range(self.config.seed, self.config.seed + self.seeds):
            for weights in WEIGHTS:
                name = f"{weights}-seed{seed}"
                path = self.folder / name / f"evaluation-{key}.json"
                if not path.exists():
                    loaded = loaded or _Loaded(self)
                    found = loaded.rows(self.folder / name / MODEL, weights, seed, name, report)
                    write_json_atomic(path, found)
                rows += [{"seed": seed, **row} for row in json.loads(path.read_text(encoding="utf-8"))]
        return rows


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


class _Loaded:
    """The language model and the datasets of a study."""

    def __init__(self, study: Study):
        self.config, self.measure = study.config, study.measure
        device = study.config.torch_device()
        self.lm, tokenizer = load_language_model(study.config.model_name, device, torch.float32)
        self.tokenizer = tokenizer.plain
        length = study.config.max_length
        self.trained = create_dataset(study.config.datasets(), self.tokenizer, length)
        self.held_out = create_dataset(study.held_out, self.tokenizer, length) if study.held_out else None

    def rows(
        self, place: Path, weights: str, seed: int, name: str, report: Callable[[str, int, int], None]
    ) -> list[dict[str, Any]]:
        """Those of a run, and with the hypernetwork those of the model alone."""
        known, validation = self.trained.split(self.config.val_fraction, seed)
        groups: list[tuple[str, TaskDataset, Sequence[int], Sequence[int]]] = [
            (TRAINED, self.trained, known, validation)
        ]
        if self.held_out is not None:
            everything = range(len(self.held_out))
            groups.append((HELD_OUT, self.held_out, everything, everything))
        if weights == DATASET:
            # other datasets have no adapter
            del groups[1:]
        model: Any = None
        if weights == PROMPT:
            model = TaskWeaver.from_pretrained(place, lm=self.lm, device=str(self.lm.device))
        else:
            ctxkern.load_attached(self.lm, place)
        try:
            planned = []
            for group, dataset, shown, indices in groups:
                chosen = spread(dataset, indices, self.measure.examples)
                planned.append((group, dataset, chosen, self._arms(model, weights, dataset, shown, chosen, seed)))
            total, done, rows = sum(len(chosen) * len(arms) for _, _, chosen, arms in planned), 0, []

            def count(examples: int) -> None:
                nonlocal done
                done += examples
                report(name, done, total)

            for (group, dataset, shown, _), (_, _, chosen, arms) in zip(groups, planned, strict=True):
                found = evaluate(
                    arms,
                    self.tokenizer,
                    dataset,
                    chosen,
                    batch_size=self.measure.batch_size,
                    max_new_tokens=self.measure.max_new_tokens,
                    known=shown,
                    report=count,
                )
                rows += [{"group": group, **row} for row in found]
            return rows
        finally:
            ctxkern.detach(self.lm)

    def _arms(
        self,
        weaver: TaskWeaver | None,
        weights: str,
        dataset: TaskDataset,
        shown: Sequence[int],
        chosen: Sequence[int],
        seed: int,
    ) -> list[Arm]:
        if weaver is None:
            model = TrainedAdapters(self.lm).eval()
            own = weights == DATASET
            return [
                Arm(NAMES[weights], model, lambda part: torch.tensor([dataset.file_ids[i] if own else 0 for i in part]))
            ]
        arms = prompt_arms(weaver, self.tokenizer, dataset, chosen, seed)
        if self.measure.shots:
            arms.append(few_shot_arm(arms[0].model, self.tokenizer, dataset, shown, self.measure.shots, seed))
        return arms

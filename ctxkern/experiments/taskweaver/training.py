"""The job of `ctxkern taskweaver train`: a hypernetwork, or what it is compared with, on several datasets at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.hub import load_language_model
from ctxkern.experiments.core.seeding import derive_seed
from ctxkern.experiments.taskweaver.adapters import Bank, TrainedAdapters, attach_bank
from ctxkern.experiments.taskweaver.config import DATASET, PROMPT, TaskWeaverSettings
from ctxkern.experiments.taskweaver.data import Collator, create_dataset
from ctxkern.experiments.taskweaver.evaluation import spread
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver, check_positions
from ctxkern.experiments.taskweaver.measure import (
    PromptEmbeddings,
    Score,
    TrainedModel,
    TrainedWeaver,
    count_labels,
    mean_loss,
    score,
)


class TaskWeaverJob:
    """What `ctxkern taskweaver train` trains.

    Raises:
        MissingExtraError, OSError, ValueError: settings, a model or data that do not fit.
    """

    def __init__(self, config: TaskWeaverSettings):
        datasets = config.datasets()
        device = config.torch_device()
        lm, self.tokenizer = load_language_model(config.model_name, device, torch.float32)
        self.dataset = create_dataset(datasets, self.tokenizer.plain, config.max_length)
        check_positions(lm, "max_length", self.dataset.longest())
        self.train, self.validation = self.dataset.split(config.val_fraction, config.seed)
        chosen = spread(self.dataset, self.validation, config.eval_examples)
        self.chosen = {
            name: [i for i in chosen if self.dataset.file_ids[i] == number]
            for number, name in enumerate(self.dataset.names)
        }
        self.embeddings: PromptEmbeddings | None = None
        self.bank: Bank | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "weights"))
            self.model = self._model(lm, config).to(device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.collator = Collator(self.tokenizer.pad_id)
        self.sampler = MixedFileBatchSampler(
            [self.dataset.file_ids[i] for i in self.train],
            min(config.batch_size, len(self.train)),
            seed=config.seed,
            drop_last=True,
        )
        # a run that goes on has its steps already
        steps = config.training_steps or config.num_epochs * len(self.sampler)
        self.config = replace(config, training_steps=steps)
        self.accuracies: dict[str, float] = {}
        self.run_dir: Path | None = None

    def _model(self, lm: Any, config: TaskWeaverSettings) -> TrainedModel:
        if config.weights == PROMPT:
            weaver = TaskWeaver(lm, config.weaver())
            self.embeddings = PromptEmbeddings(weaver, config.cached_prompts)
            return TrainedWeaver(weaver, config.lora_dropout, _dtype(config))
        count = len(self.dataset.names) if config.weights == DATASET else 1
        self.bank = attach_bank(lm, count, config.adapter_rank, config.weaver())
        return TrainedAdapters(lm, config.lora_dropout, _dtype(config))

    def batch(self, indices: list[int]) -> Batch:
        """The examples of these indices, with where their weights come from: embeddings of prompts, or numbers.

        The longest come last: the parts of a batch, with `--accumulate`, have little padding.
        """
        indices = sorted(indices, key=self.dataset.length)
        batch = self.collator([self.dataset[i] for i in indices])
        batch["padding_mask"] = batch["attention_mask"] == 0
        if self.embeddings is not None:
            batch["source"] = self.embeddings([self.dataset.prompt(i) for i in indices])
        else:
            batch["source"] = batch["file_id"] * (self.config.weights == DATASET)
        return batch

    def batches(self) -> Callable[[int], Batch]:
        """The batch of a step, of several datasets."""
        return lambda step: self.batch([self.train[i] for i in self.sampler.batch_at(step)])

    def weigh(self, batch: Batch) -> float:
        """The labels, over which the loss is a mean."""
        return count_labels(batch)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The mean over labels."""
        return mean_loss(model, batch)

    def evaluator(self) -> Callable[[Any], Mapping[str, float]]:
        """The mean loss over labels of each dataset's validation examples."""

        def evaluate(model: Any) -> dict[str, float]:
            losses = {}
            for name, indices in self.chosen.items():
                total = Score()
                for start in range(0, len(indices), self.config.batch_size):
                    batch = self.batch(indices[start : start + self.config.batch_size])
                    device = self.model.lm.device
                    total += score(model, {key: value.to(device) for key, value in batch.items()})
                losses[name] = total.loss / total.labels if total.labels else math.nan
                if total.labels:
                    self.accuracies[name] = total.right / total.labels
            return losses

        return evaluate

    def observe(self, model: Any) -> Mapping[str, float]:
        """The token accuracies of the last evaluation."""
        return {f"token_accuracy/{name}": value for name, value in self.accuracies.items()}


def _dtype(config: TaskWeaverSettings) -> torch.dtype | None:
    return torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None

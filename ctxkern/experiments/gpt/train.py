"""Training a model of characters: its loss, estimates of it, and the job."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.core.experiment import Inputs
from ctxkern.experiments.core.groups import modulated_groups
from ctxkern.experiments.core.memory import build_model
from ctxkern.experiments.core.modes import eval_mode
from ctxkern.experiments.core.plots import BY_TOKEN
from ctxkern.experiments.core.seeding import derive_seed, generator
from ctxkern.experiments.gpt.config import GPTSettings, TextSettings
from ctxkern.experiments.gpt.data import CharData, count_labels
from ctxkern.experiments.gpt.model import GPT

# in a run folder: the vocabulary, and the names of the texts
VOCAB, NAMES = "vocab.txt", "names.json"
# a number of the log: the estimate of the training loss without dropout
TRAIN_ESTIMATE = "train_estimate"


def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, of logits [B, S, V] against targets [B, S] int64 where they are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """The mean over all targets of batches, in eval mode, and how many there are; nan where there are none."""
    device = next(model.parameters()).device
    total, labels = 0.0, 0
    with eval_mode(model):
        for batch in batches:
            count = count_labels(batch)
            if count:
                batch = {name: value.to(device) for name, value in batch.items()}
                loss = criterion(model(batch["input"], file_ids=batch["file_id"]), batch["target"])
                total, labels = total + loss.item() * count, labels + count
    return total / labels if labels else math.nan, labels


class CharJob:
    """A model of characters on texts.

    Args:
        config: the settings.
        data: the texts.
        model: called with ids [B, S] and `file_ids` [B], to logits [B, S, V].
        optimizer: over its parameters.
        block_size: the characters of a window.
    """

    def __init__(
        self,
        config: TextSettings,
        data: CharData,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        block_size: int,
    ):
        self.config, self.data, self.model, self.optimizer = config, data, model, optimizer
        self.block_size = block_size
        self._estimates: dict[str, float] = {}
        # of `whole_losses`, at the end
        self.whole: dict[str, float] = {}
        if not any(data.sizes["validation"]):
            for name, idle in (("patience", 0), ("schedule", "cosine")):
                value = getattr(config, name)
                if value == "plateau" or (name == "patience" and value):
                    raise ValueError(f"{name} is {value!r}; it must be {idle!r} where no text is left to validate on")

    def _batch(self, split: str, rng: torch.Generator, **how: Any) -> Batch:
        c = self.config
        chosen = {"chunk_windows": c.chunk_windows, "balanced": c.balanced} | how
        return self.data.get_batch(split, c.batch_size, self.block_size, rng, **chosen)

    def batches(self) -> Callable[[int], Batch]:
        """The batch of a step, which the seed and the step decide."""
        return lambda step: self._batch("train", generator(self.config.seed, "batch", step))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The mean over targets."""
        return criterion(model(batch["input"], file_ids=batch["file_id"]), batch["target"])

    def weigh(self, batch: Batch) -> float:
        """The targets, over which the loss is a mean."""
        return count_labels(batch)

    def estimate_loss(self, model: nn.Module, split: str, file_id: int | None = None) -> tuple[float, int]:
        """The mean loss of `eval_iters` random batches, the same ones at each call, and their targets.

        Args:
            model: to measure, which is done in eval mode.
            split: "train" or "validation".
            file_id: the text to draw from; None for all, as in training.
        """
        place = "all" if file_id is None else file_id
        rng = generator(self.config.seed, "estimate", split, place)
        # as independent as they can be
        how = {"chunk_windows": 1, "file_id": file_id}
        return mean_loss(model, (self._batch(split, rng, **how) for _ in range(self.config.eval_iters)))

    def evaluator(self) -> Callable[[Any], Mapping[str, float]] | None:
        """Estimates of the loss of each validation text, by name; None where there is none."""
        lengths = self.data.sizes["validation"]
        if not any(lengths):
            return None

        def evaluate(model: nn.Module) -> dict[str, float]:
            losses, total, labels = {}, 0.0, 0
            for file_id, name in enumerate(self.data.validated):
                loss, count = self.estimate_loss(model, "validation", file_id) if lengths[file_id] else (math.nan, 0)
                losses[name] = loss
                if count:
                    # a training step has files by their sizes, estimates as many windows of each
                    share = 1 if self.config.balanced else lengths[file_id]
                    total, labels = total + loss * share, labels + share
            train = self.estimate_loss(model, "train")[0]
            self._estimates = {TRAIN_ESTIMATE: train, BY_TOKEN: total / labels if labels else math.nan}
            return losses

        return evaluate

    def observe(self, model: nn.Module) -> Mapping[str, float]:
        """The estimate of the training loss, and of the validation loss over all texts as training has them."""
        return {name: loss for name, loss in self._estimates.items() if math.isfinite(loss)}

    def whole_losses(self, model: nn.Module) -> dict[str, float]:
        """The loss of each whole validation text by name, each character predicted once; nan where there is none."""
        c = self.config
        return {
            name: mean_loss(model, self.data.whole(file_id, self.block_size, 64, c.final_characters))[0]
            for file_id, name in enumerate(self.data.validated)
        }


def read_texts(config: TextSettings, inputs: Inputs) -> CharData:
    """The texts that settings and command line name.

    Raises:
        OSError, ValueError: as `CharData`.
    """
    return CharData(
        inputs.found.files,
        # what the run began with
        vocab=config.vocab if inputs.resumed is None else inputs.resumed / VOCAB,
        val_fraction=config.val_fraction,
        val_file=config.val_file,
        skip_bad=inputs.skip_bad,
        bad=inputs.found.bad,
    )


def adamw(groups: list[dict], config: TextSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over groups."""
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


def prepare(config: GPTSettings, inputs: Inputs) -> CharJob:
    """Read the texts, and build model and optimizer.

    Raises:
        OSError, ValueError: texts or settings that do not fit, or a model too large for the memory.
    """
    device = config.torch_device()
    data = read_texts(config, inputs)
    model_config = config.model_config(data.tokenizer.vocab_size, len(data.names))

    def make() -> GPT:
        torch.manual_seed(derive_seed(config.seed, "weights"))
        return GPT(model_config)

    model = build_model(make, device, torch.float32, "d_model, n_layers, block_size or context_dim")
    scale = config.bilinear_lr_scale
    if scale is None:
        scale = 1 / max(1, config.context_dim) if config.rank is None else 1.0
    groups = modulated_groups(
        model,
        lr=config.lr,
        context_lr=config.lr * config.context_lr_scale,
        bilinear_lr=config.lr * scale,
        weight_decay=config.weight_decay,
        bilinear_weight_decay=config.weight_decay,
    )
    return CharJob(config, data, model, adamw(groups, config, device), config.block_size)

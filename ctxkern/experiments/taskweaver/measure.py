"""Losses and accuracies of a language model in the weights that a TaskWeaver writes."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxkern
from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver

# of gradients within a language model in float16, whose smallest numbers are 6e-8
_FP16_SCALE = 1024.0


class TrainedModel(nn.Module):
    """A frozen language model with weights that are trained, as the training loop takes one: its state is those alone.

    Args:
        lm: the language model.
        dropout: share of a target layer's input hidden from its weights, in training.
        dtype: in which the language model computes, by autocast; None: as it is. Gradients within it are scaled where
            it is float16.
    """

    def __init__(self, lm: Any, dropout: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__()
        self.lm, self.dropout, self.dtype = lm, dropout, dtype

    def train(self, mode: bool = True) -> "TrainedModel":
        """Sets the mode of what is trained; the language model stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def using(self, source: Tensor | None) -> ctxkern.use:
        """What a forward runs in; `source` has a row for each of the batch, None: the language model as it is."""
        if source is None:
            return ctxkern.use(self.lm)
        return ctxkern.use(self.lm, **self.weights(source), dropout=self.dropout if self.training else 0.0)

    def weights(self, source: Tensor) -> dict[str, Any]:
        """The arguments of `ctxkern.use` for a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(source)")

    def unscaled(self, grad: Tensor) -> Tensor:
        """A gradient that comes from within the language model, for `register_hook`."""
        return grad / _FP16_SCALE if self.dtype is torch.float16 else grad

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor, source: Tensor | None) -> Tensor:
        """Logits [B, s, V] at the positions `keep` [s] of input_ids [B, S], in the weights of `source`."""
        with self.using(source), self._cast():
            logits = self.lm(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False
            ).logits
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.dtype is torch.float16 and logits.requires_grad:
            logits.register_hook(lambda grad: grad * _FP16_SCALE)
        return logits

    def _cast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.lm.device.type, self.dtype)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained."""
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Read what `state_dict` gave."""
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict, assign)


class TrainedWeaver(TrainedModel):
    """A TaskWeaver; the source of weights is the embeddings [B, D] of prompts."""

    def __init__(self, weaver: TaskWeaver, dropout: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__(weaver.lm, dropout, dtype)
        self.weaver = weaver

    def weights(self, source: Tensor) -> dict[str, Any]:
        """Those that the hypernetwork writes."""
        written = self.weaver.weights(source)
        for t in (t for pair in written.values() for t in pair):
            if t.requires_grad:
                t.register_hook(self.unscaled)
        return {"lora": written}


@dataclass
class Score:
    """Sums over labels: of losses, of those that were the likeliest token, and how many there are; and how many rows
    had nothing but such tokens."""

    loss: float = 0.0
    right: int = 0
    labels: int = 0
    exact: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.loss + other.loss,
            self.right + other.right,
            self.labels + other.labels,
            self.exact + other.exact,
        )


def _labelled(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [n, V], labels [n]) at the positions where some row has a label; columns after the last are left out."""
    labels = batch["labels"][:, 1:]
    keep = (labels != IGNORE_INDEX).any(0).nonzero().flatten()
    stop = int(keep[-1]) + 1 if len(keep) else 1
    logits = model(batch["input_ids"][:, :stop], batch["attention_mask"][:, :stop], keep, batch.get("source"))
    return logits.flatten(0, 1), labels[:, keep].flatten()


def mean_loss(model: Any, batch: Batch) -> Tensor:
    """The mean cross entropy over the labels of a batch."""
    logits, labels = _labelled(model, batch)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def count_labels(batch: Batch) -> int:
    """How many labels a batch has."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


@torch.no_grad()
def score(model: Any, batch: Batch) -> Score:
    """The sums over the labels of a batch."""
    logits, labels = _labelled(model, batch)
    there = labels != IGNORE_INDEX
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    right = logits.argmax(-1) == labels
    exact = (right | ~there).view(len(batch["labels"]), -1).all(1)
    return Score(float(loss), int(right[there].sum()), int(there.sum()), int(exact.sum()))


class PromptEmbeddings:
    """The embeddings of prompts by the frozen language model, computed once each.

    Each prompt is read alone: in a batch its last bits would depend on the others, and a resumed run has other ones.

    Args:
        weaver: whose language model it is.
        most: how many are kept, on the CPU; further ones are computed at each use.
    """

    def __init__(self, weaver: TaskWeaver, most: int):
        self.weaver, self.most = weaver, most
        self.computed = 0
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, prompts: Sequence[Tensor]) -> Tensor:
        """[B, D], on the CPU, of prompts [s]."""
        return torch.stack([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: Tensor) -> Tensor:
        key = prompt.to(torch.int32).numpy().tobytes()
        found = self._kept.get(key)
        if found is None:
            self.computed += 1
            found = self.weaver.embed(prompt.long()[None].to(self.weaver.lm.device))[0].cpu()
            if len(self._kept) < self.most:
                self._kept[key] = found
        return found

"""What a TaskWeaver is compared with: adapters that do not depend on the prompt, a shared one or one a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ctxkern
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver, TaskWeaverConfig
from ctxkern.experiments.taskweaver.measure import TrainedModel

_MOST_RANK = 256


class TrainedAdapters(TrainedModel):
    """A language model with a bank of adapters (`ctxkern.attach_adapters`); the source of weights is their numbers [B].

    Args: as `TrainedModel`.
    """

    def __init__(self, lm: Any, dropout: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__(lm, dropout, dtype)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.unscaled)

    def weights(self, source: Tensor) -> dict[str, Any]:
        """The adapters of these numbers."""
        return {"adapter_index": source}


@dataclass(frozen=True)
class Bank:
    """The sizes of a bank of adapters, and the names of the layers that have it."""

    count: int
    rank: int
    targets: Sequence[str]


def attach_bank(lm: Any, count: int, rank: int, config: TaskWeaverConfig) -> Bank:
    """Give a frozen causal language model of transformers a bank of adapters, in place.

    Args:
        lm: the language model.
        count: how many adapters.
        rank: of each; 0: the one of `equal_rank`.
        config: its targets and its scale, alpha / rank at the rank of a TaskWeaver, are used.

    Raises:
        ValueError: as `ctxkern.attach_adapters`.
    """
    rank = rank or equal_rank(lm, config, count)
    alpha = config.lora_alpha / config.lora_rank * rank
    targets = ctxkern.attach_adapters(lm, count, rank, config.targets, alpha=alpha)
    lm.eval()
    return Bank(count, rank, targets)


def equal_rank(lm: Any, config: TaskWeaverConfig, count: int) -> int:
    """The rank at which `count` adapters have as many parameters as the hypernetwork, nearly; 1 to 256.

    `lm` is attached to and detached.
    """
    with torch.device("meta"):
        weaver = TaskWeaver(lm, config)
    total = weaver.parameter_counts()["trainable"]
    per_rank = sum(target.d_in + target.d_out for target in weaver.targets.values())
    ctxkern.detach(lm)
    return min(_MOST_RANK, max(1, round(total / (count * per_rank))))

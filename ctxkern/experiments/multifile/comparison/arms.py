"""The arms of a comparison: each a way to train on many files, as settings of `ctxkern train`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import MultiFileTransformer

# of the learning rate, over that which is given
RATES = (1.0, 0.5, 2.0)


@dataclass(frozen=True)
class Arm:
    """What an arm is.

    Attributes:
        text: for tables.
        settings: what it changes of the settings that all share.
        knobs: settings that are tuned after the learning rate, each with its values, the first the one to start with.
        models: 1, or "steps" or "total" for a model a file: as many steps each, or all together.
    """

    text: str
    settings: Mapping[str, Any]
    knobs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    models: int | str = 1


_VECTORS = {"context_std": (0.02, 0.2), "context_lr_scale": (1.0, 5.0)}
_NORMED = {"context_lr_scale": (10.0, 3.0)}
ARMS = {
    "none": Arm("no context", {"form": "none"}),
    "token": Arm("a token a file", {"form": "token"}, _VECTORS),
    "added": Arm("an embedding a file, added", {"form": "added"}, _VECTORS),
    "film": Arm("FiLM", {"form": "film"}, _NORMED),
    "lora": Arm("LoRA a file", {"form": "lora"}, {"context_lr_scale": (1.0, 5.0)}),
    "factored": Arm("bilinear, rank 32", {"form": "bilinear", "rank": 32}, _NORMED),
    "bilinear": Arm("bilinear", {"form": "bilinear"}, _NORMED),
    "bilinear+film": Arm("bilinear and FiLM", {"form": "bilinear+film"}, _NORMED),
    "wider": Arm("no context, wider", {"form": "none"}),
    "own-total": Arm("a model a file, as many steps in all", {"form": "none"}, models="total"),
    "own-steps": Arm("a model a file, as many steps each", {"form": "none"}, models="steps"),
}
# what all others are compared with
BASE = "none"


def equal_width(config: TrainConfig, vocab_size: int, num_files: int) -> int:
    """The `d_model` at which a model without context has as many parameters as `config` has with bilinear tensors."""

    def count(**changes: Any) -> int:
        settings = {name: getattr(config, name) for name in TrainConfig.names()} | changes
        with torch.device("meta"):
            model = MultiFileTransformer(TrainConfig(**settings).model_config(vocab_size, num_files))
        return sum(parameter.numel() for parameter in model.parameters())

    target, step = count(form="bilinear"), config.n_heads
    low = high = config.d_model // step
    while count(form="none", d_model=high * step) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(form="none", d_model=middle * step) < target else (low, middle)
    return min((low * step, high * step), key=lambda width: abs(count(form="none", d_model=width) - target))

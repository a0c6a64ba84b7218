"""Language models of characters, from bigrams to a transformer: each is the one before and one part more."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ctxkern.experiments.gpt.config import GPTConfig
from ctxkern.experiments.gpt.model import GPT


class Bigram(nn.Module):
    """The next character from this one alone: a table of logits [V, V].

    Args:
        vocab_size: V.
        init_std: standard deviation of the table at step 0.
    """

    def __init__(self, vocab_size: int, init_std: float):
        super().__init__()
        self.token_embeddings = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.token_embeddings.weight, std=init_std)

    def forward(self, inputs: torch.Tensor, *, file_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] for ids [B, S] int64; `file_ids` are not looked at."""
        return self.token_embeddings(inputs)


@dataclass(frozen=True)
class Rung:
    """A model: what is new in it, and what it leaves out of a `GPTConfig` (None for `Bigram`)."""

    new: str
    without: Mapping[str, Any] | None


_PLAIN = {"norm": "none", "residual": False, "out_proj": False, "n_layers": 1}
RUNGS = {
    "bigram": Rung("a table of what follows each character", None),
    "head": Rung(
        "characters and positions embedded, and one head of attention", {**_PLAIN, "mlp_ratio": 0, "n_heads": 1}
    ),
    "heads": Rung("several narrower heads of the same width together", {**_PLAIN, "mlp_ratio": 0}),
    "feed-forward": Rung("an MLP after attention", _PLAIN),
    "residual": Rung("several blocks, with residual connections and output projections", {"norm": "none"}),
    "norm": Rung("a norm in front of attention and MLP, and of the head: a transformer", {}),
}


def build(rung: str, config: GPTConfig) -> nn.Module:
    """The model of a rung, with those of the sizes of `config` that it has.

    Raises:
        ValueError: no such rung.
    """
    if rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}; it must be one of {', '.join(RUNGS)}")
    without = RUNGS[rung].without
    if without is None:
        return Bigram(config.vocab_size, config.init_std)
    return GPT(replace(config, **without))

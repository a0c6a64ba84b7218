"""Causal language models of transformers, from a folder or the hub, and their tokenizers."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.extras import require

_CONFIG = "config.json"


def _where(name: str) -> dict[str, Any]:
    """What from_pretrained needs besides the name: a folder may hold one GGUF file and nothing else."""
    folder = Path(name)
    if folder.is_dir() and not (folder / _CONFIG).exists():
        found = sorted(folder.glob("*.gguf"))
        if len(found) != 1:
            has = ", ".join(path.name for path in found) or "none"
            raise ValueError(
                f"model is {name!r}, a folder without {_CONFIG}; it must hold one GGUF file, and has {has}"
            )
        return {"gguf_file": found[0].name}
    return {}


def load_language_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, "HubTokenizer"]:
    """(model in evaluation mode, its tokenizer) of a folder or a name on the hub.

    Raises:
        MissingExtraError: transformers is not installed. ValueError, OSError: there is no such model, or no tokenizer.
    """
    transformers = require("transformers", "models")
    if not name:
        raise ValueError("model is ''; it must be a folder or a name on the hub")
    where = _where(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    return model.to(device).eval(), HubTokenizer(tokenizer)


class HubTokenizer:
    """A tokenizer of transformers as the project's datasets take one: a line end parts the prompt from the answer.

    Args:
        plain: the tokenizer.

    Raises:
        ValueError: it has no end-of-text token.
    """

    def __init__(self, plain: Any):
        self.plain = plain
        if plain.eos_token_id is None:
            raise ValueError(f"the tokenizer is a {type(plain).__name__} without eos_token; it must have one")
        self.eos_id: int = plain.eos_token_id
        self.pad_id: int = self.eos_id if plain.pad_token_id is None else plain.pad_token_id
        line_end = self.encode("\n")
        self.sep_id: int = line_end[-1] if line_end else self.eos_id

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.plain)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        return self.plain.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without specials."""
        return self.plain.decode(list(map(int, ids)), skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> Sequence[str]:
        """Write its files."""
        return self.plain.save_pretrained(folder)

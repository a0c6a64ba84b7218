"""A trained run of `ctxkern gpt train`, read back, and text from it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ctxkern.experiments.core.checkpoint import BEST, LAST, load_checkpoint
from ctxkern.experiments.core.command import CONFIG
from ctxkern.experiments.core.generation import generate_tokens
from ctxkern.experiments.core.modes import eval_mode
from ctxkern.experiments.core.names import join_names, printable
from ctxkern.experiments.core.tokenizers import Alphabet
from ctxkern.experiments.gpt.config import GPTSettings
from ctxkern.experiments.gpt.model import GPT
from ctxkern.experiments.gpt.train import NAMES, VOCAB
from ctxkern.nn import KVCache

CHECKPOINTS = {"best": BEST, "last": LAST}


@dataclass
class Run:
    """What `load_run` gives. `names` are those of the texts by file id."""

    path: Path
    model: GPT
    tokenizer: Alphabet
    names: list[str]
    step: int

    def context(self, name: str | None) -> torch.Tensor | None:
        """The context [1, K] of a text, by its name or the name without its suffix; None is the mean of all.

        Raises:
            ValueError: no text, or several, are called so; the run has no contexts.
        """
        contexts = self.model.contexts()
        if contexts is None:
            if name is not None:
                raise ValueError(f"file is {name!r}; it must be left out: the run has no contexts")
            return None
        if name is None:
            return contexts.mean(0, keepdim=True)
        found = [i for i, known in enumerate(self.names) if name in (known, Path(known).name, Path(known).stem)]
        if len(found) != 1:
            kind = "several of" if found else "none of"
            raise ValueError(f"file is {name!r}, which names {kind} the run's texts: {join_names(self.names, 20)}")
        return contexts[found]


def load_run(run_dir: str | os.PathLike, *, checkpoint: str = "best", device: torch.device | str = "cpu") -> Run:
    """The model of a run folder of `ctxkern gpt train`, in evaluation mode, with its vocabulary.

    Args:
        run_dir: the folder.
        checkpoint: "best", the lowest mean validation loss (the last where none was measured), or "last".
        device: of the model.

    Raises:
        ValueError: no run, or another `checkpoint`. CheckpointError: a checkpoint that is missing or damaged.
    """
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint is {checkpoint!r}; it must be one of {', '.join(CHECKPOINTS)}")
    folder = Path(run_dir)
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        kind = stored["experiment"]
    except FileNotFoundError as error:
        lacks = Path(error.filename).name
        raise ValueError(f"RUN is {printable(folder)}; it must be the folder of a run ({lacks} is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"RUN is {printable(folder)}, whose {CONFIG} or {NAMES} cannot be read: {error}") from error
    if kind != "gpt train":
        raise ValueError(f"RUN is {printable(folder)}, a run of `ctxkern {kind}`; it must be one of `gpt train`")
    config, tokenizer = GPTSettings(**stored["train"]), Alphabet.read(folder / VOCAB)
    model = GPT(config.model_config(tokenizer.vocab_size, len(names))).to(device).eval()
    place = folder / CHECKPOINTS[checkpoint]
    if checkpoint == "best" and not place.exists():
        place = folder / LAST
    return Run(folder, model, tokenizer, names, load_checkpoint(place, model).step)


def generate(
    model: GPT,
    inputs: torch.Tensor,
    *,
    max_new_tokens: int,
    contexts: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    keep: int | None = None,
) -> torch.Tensor:
    """Continue `inputs` [B, S] int64 in `contexts` [B, K], in eval mode, past the block size too.

    Everything else, and what is returned and raised, is that of `ctxkern.experiments.core.generation.generate_tokens`.
    """

    def forward(tokens: torch.Tensor, caches: Sequence[KVCache], start: int) -> torch.Tensor:
        return model(tokens, contexts=contexts, caches=caches, start=start)

    with eval_mode(model):
        return generate_tokens(
            forward, inputs,
            num_layers=len(model.blocks), seq_len=model.config.block_size, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, use_cache=use_cache, keep=keep,
        )  # fmt: skip

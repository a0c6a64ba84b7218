"""A trained run, read back: its model, tokenizer and files."""

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import ctxkern
from ctxkern.experiments.core.checkpoint import BEST, LAST, CheckpointError, load_checkpoint
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_atomic
from ctxkern.experiments.core.names import join_names, path_from_json, printable, utf8_alias
from ctxkern.experiments.core.tokenizers import Tokenizer, load_tokenizer
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.forms import BILINEAR, adapters
from ctxkern.experiments.multifile.model import MultiFileTransformer

CONFIG, NAMES, TOKENIZER, ADDED = "config.json", "names.json", "tokenizer.json", "added.safetensors"
CHECKPOINTS = {"best": BEST, "last": LAST}


@dataclass
class Run:
    """What `load_run` gives. `names` are those of the files by file id, the ones of `add_file` last."""

    path: Path
    config: TrainConfig
    model: MultiFileTransformer
    tokenizer: Tokenizer
    names: list[str]
    step: int

    def file_id(self, name: str) -> int:
        """The id of a file by its name, its name without suffix, or its number.

        Raises:
            ValueError: none or several are called so.
        """
        if name in self.names:
            return self.names.index(name)
        found = [i for i, known in enumerate(self.names) if name in (Path(known).name, Path(known).stem)]
        if not found and name.isdecimal() and int(name) < len(self.names):
            found = [int(name)]
        if len(found) != 1:
            kind = "several of" if found else "none of"
            raise ValueError(f"file is {name!r}, which names {kind} the run's files: {join_names(self.names, 20)}")
        return found[0]

    def model_of(self, file_id: int) -> nn.Module:
        """A copy of the model for one file: token ids [B, S] int64 to logits [B, S, V], in operators of torch alone."""
        vector = self.model.get_file_context(torch.tensor([file_id])).detach()
        if self.config.form == "none":
            return copy.deepcopy(self.model)
        if self.config.form == "lora":
            return _with_adapters(self.model, vector)
        if self.config.form in BILINEAR:
            merged = ctxkern.merge(self.model, vector).eval()
            return merged if self.config.form == "bilinear" else _InContext(merged, vector)
        return _InContext(copy.deepcopy(self.model), vector)

    def remember(self, name: str, vector: torch.Tensor) -> int:
        """Add a file with its context [K] to the model, and to the run folder, where `load_run` finds it again.

        Raises:
            ValueError: the run has a file of this name, or its files have no contexts.
        """
        if self.model.context_embeddings is None:
            raise ValueError(f"RUN has the form {self.config.form}; it must have contexts")
        if name in self.names:
            raise ValueError(f"name is {name!r}; it must be a new one: the run has a file of this name")
        file_id = self.model.add_file(vector)
        self.names.append(name)
        trained = len(_names(self.path))
        added = self.model.context_embeddings.weight[trained:].detach().cpu()
        metadata = {"names": json.dumps(self.names[trained:])}
        save = require("safetensors.torch").save_file
        write_atomic(self.path / ADDED, lambda place: save({"contexts": added.contiguous()}, place, metadata=metadata))
        return file_id


class _InContext(nn.Module):
    def __init__(self, model: MultiFileTransformer, vector: torch.Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("vector", vector)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs, self.vector.expand(inputs.shape[0], -1))


@torch.no_grad()
def _with_adapters(model: MultiFileTransformer, vector: torch.Tensor) -> MultiFileTransformer:
    """A model of the form "none" whose weights are those of one file."""
    config = replace(model.config, form="none")
    plain = MultiFileTransformer(config).to(vector).eval()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("context_")})
    pairs = adapters(vector, config.d_model, config.lora_rank)
    for block in plain.blocks:
        for name in "qkv":
            A, B = next(pairs)
            getattr(block.attention, f"W_{name}_base").weight += (B[0] @ A[0]).mT
    return plain


def _stored(run_dir: Path) -> dict:
    path = run_dir / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"RUN is {printable(run_dir)}; it must be the folder of a run ({CONFIG} is missing)") from None
    except ValueError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    if stored.get("experiment", "train") != "train":
        kind = stored["experiment"]
        raise ValueError(f"RUN is {printable(run_dir)}, a run of `ctxkern {kind}`; it must be one of `train`")
    return stored


def _names(run_dir: Path) -> list[str]:
    """Those of the files that the run trained on, by file id."""
    try:
        return json.loads((run_dir / NAMES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"RUN is {printable(run_dir)}; it must be the folder of a run ({NAMES} is missing)") from None


def source_paths(run_dir: str | os.PathLike) -> list[Path]:
    """The files that a run read, by file id; those of variants and of `add-file` are not among them.

    Raises:
        ValueError: no run.
    """
    return [path_from_json(entry["path"]) for entry in _stored(Path(run_dir))["files"]]


def load_run(run_dir: str | os.PathLike, *, checkpoint: str = "best", device: str = "cpu") -> Run:
    """The model of a run folder of `ctxkern train`, in evaluation mode, with its tokenizer and the names of its files.

    Args:
        run_dir: the folder.
        checkpoint: "best", the lowest mean validation loss (the last where none was measured), or "last".
        device: of the model.

    Raises:
        ValueError: no run, or another `checkpoint`. CheckpointError: a checkpoint that is missing or damaged.

    Example:
        >>> run = load_run("runs/texts")  # doctest: +SKIP
        >>> run.model(tokens, file_ids=torch.tensor([run.file_id("notes.txt")]))  # doctest: +SKIP
    """
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint is {checkpoint!r}; it must be one of {', '.join(CHECKPOINTS)}")
    folder = Path(run_dir)
    stored = _stored(folder)
    config = TrainConfig(**stored["train"])
    tokenizer = load_tokenizer(folder / TOKENIZER)
    names = _names(folder)
    model = MultiFileTransformer(config.model_config(tokenizer.vocab_size, len(names)))
    model.to(device=device, dtype=torch.float64 if config.dtype == "float64" else torch.float32).eval()
    place = folder / CHECKPOINTS[checkpoint]
    if checkpoint == "best" and not place.exists():
        place = folder / LAST
    try:
        step = load_checkpoint(place, model).step
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run must have reached a checkpoint") from error
    if (folder / ADDED).exists():
        with utf8_alias(folder) as alias, require("safetensors").safe_open(alias / ADDED, framework="pt") as file:
            names += json.loads(file.metadata()["names"])
            for vector in file.get_tensor("contexts"):
                model.add_file(vector)
    return Run(folder, config, model, tokenizer, names, step)

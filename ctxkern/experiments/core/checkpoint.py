"""Checkpoints: model, optimizer and step in one safetensors file, replaced as a whole."""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_atomic

LAST, BEST = "last.safetensors", "best.safetensors"
_FORMAT = "ctxkern-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


@dataclass
class Checkpoint:
    """What :func:`load_checkpoint` read: ``step``, the caller's ``config`` and ``extra``."""

    step: int
    config: dict
    extra: dict = field(default_factory=dict)


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        # safetensors refuses tied weights
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[f"model.{name}"] = value
    return tensors


def _optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"scalars": scalars, "sizes": [len(group["params"]) for group in state["param_groups"]]}


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    config: Mapping | None = None,
    extra: Mapping | None = None,
) -> None:
    """Write a checkpoint; a kill at any instant leaves the previous file or the new one.

    Args:
        path: the file; its folder must exist.
        model: its ``state_dict`` is saved in the dtypes that it has.
        optimizer: any ``torch.optim`` optimizer whose state holds tensors and plain numbers; None saves none.
        step: training steps completed.
        config: JSON-able; compared by :func:`load_checkpoint`.
        extra: JSON-able; handed back by :func:`load_checkpoint`.
    """
    safetensors = require("safetensors.torch")
    tensors = _model_tensors(model)
    meta = {"format": _FORMAT, "step": step, "config": dict(config or {}), "extra": dict(extra or {})}
    if optimizer is not None:
        state, meta["optimizer"] = _optimizer_parts(optimizer)
        tensors |= state
    meta["crc32"] = _checksum(tensors)
    metadata = {"ctxkern": json.dumps(meta)}
    write_atomic(path, lambda temporary: safetensors.save_file(tensors, temporary, metadata=metadata))


@contextlib.contextmanager
def _open(path: Path):
    safetensors = require("safetensors")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_meta(path: Path) -> dict:
    with _open(path) as file:
        meta = json.loads((file.metadata() or {}).get("ctxkern", "{}"))
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no ctxkern checkpoint: format {meta.get('format')!r}, not {_FORMAT!r}")
    return meta


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    meta = _read_meta(path)
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _checksum(tensors) != meta["crc32"]:
        raise CheckpointError(f"{path} is damaged: the checksum of its tensors differs from the stored one")
    return tensors, meta


def read_step(path: str | os.PathLike) -> int:
    """The step of a checkpoint, without its tensors.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    return _read_meta(Path(path))["step"]


def check_config(stored: Mapping, given: Mapping, where: object) -> None:
    """Raise :class:`CheckpointError` naming each key whose values differ, with both values."""
    missing = object()
    differing = [
        f"{key} is {stored.get(key)!r} there and {given.get(key)!r} here"
        for key in sorted({*stored, *given})
        if stored.get(key, missing) != given.get(key, missing)
    ]
    if differing:
        raise CheckpointError(f"{where} belongs to another configuration: {'; '.join(differing)}")


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    config: Mapping | None = None,
) -> Checkpoint:
    """Read a checkpoint into ``model`` (and ``optimizer``) in place, bit for bit.

    Raises:
        CheckpointError: no such file; damaged; ``config`` is given and differs from the stored one; tensors of other
            names or shapes than the model has; no optimizer state, or of another number of parameters.
    """
    path = Path(path)
    tensors, meta = _read(path)
    if config is not None:
        check_config(meta["config"], json.loads(json.dumps(dict(config))), path)
    states = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    expected = model.state_dict()
    for name in sorted({*states, *expected}):
        there, here = (tuple(side[name].shape) if name in side else "absent" for side in (states, expected))
        if there != here:
            raise CheckpointError(f"{path} does not fit the model: {name} is {there} there and {here} in the model")
    if optimizer is not None:
        _load_optimizer(path, optimizer, tensors, meta)
    model.load_state_dict(states)
    return Checkpoint(meta["step"], meta["config"], meta["extra"])


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, tensors: Mapping, meta: Mapping) -> None:
    if "optimizer" not in meta:
        raise CheckpointError(f"{path} holds no optimizer state")
    current = optimizer.state_dict()
    sizes = [len(group["params"]) for group in current["param_groups"]]
    if sizes != meta["optimizer"]["sizes"]:
        raise CheckpointError(f"{path}: parameter groups of {meta['optimizer']['sizes']} there and {sizes} here")
    state = {int(index): dict(entries) for index, entries in meta["optimizer"]["scalars"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})

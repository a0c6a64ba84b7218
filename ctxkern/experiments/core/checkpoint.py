"""Checkpoints: model, optimizer and step in one safetensors file, replaced as a whole."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_atomic
from ctxkern.experiments.core.names import printable, utf8_alias

LAST, BEST = "last.safetensors", "best.safetensors"
_FORMAT = "ctxkern-checkpoint-2"
# under this key an object of the JSON stands for what JSON has not
_KIND = "kind"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


@dataclass
class Checkpoint:
    """What `load_checkpoint` read: `step`, the caller's `config` and `extra`."""

    step: int
    config: dict
    extra: dict = field(default_factory=dict)


class _Packer:
    """Turns values into JSON and collects their tensors, which safetensors wants apart and without shared memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()

    def pack(self, value: object, name: str) -> object:
        """`value` as JSON: a tensor, number, string, None, or a list, tuple or dict of these. `name` is its place."""
        if isinstance(value, torch.Tensor):
            return self._pack_tensor(value, name)
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, list):
            return [self.pack(entry, f"{name}.{i}") for i, entry in enumerate(value)]
        if isinstance(value, tuple):
            return {_KIND: "tuple", "entries": self.pack(list(value), name)}
        if isinstance(value, Mapping):
            pairs = [[self.pack(key, name), self.pack(entry, f"{name}.{key}")] for key, entry in value.items()]
            return {_KIND: "dict", "pairs": pairs}
        raise CheckpointError(
            f"{name} is of the type {type(value).__name__}; it must be a tensor, number, string, None, or a list, "
            "tuple or dict of these"
        )

    def _pack_tensor(self, value: torch.Tensor, name: str) -> dict[str, str]:
        value = value.detach()
        # a DTensor's parts lie in several processes, all of which pack
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        value = value.cpu().contiguous()
        # tied weights
        if value.numel() and value.untyped_storage().data_ptr() in self._storages:
            value = value.clone()
        self._storages.add(value.untyped_storage().data_ptr())
        while name in self.tensors:
            name += "+"
        self.tensors[name] = value
        return {_KIND: "tensor", "name": name}


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_Packer.pack`."""
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if value[_KIND] == "tensor":
        return tensors[value["name"]]
    if value[_KIND] == "tuple":
        return tuple(_unpack(value["entries"], tensors))
    return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in value["pairs"]}


def _group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


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
    write: bool = True,
) -> None:
    """Write a checkpoint; a kill at any instant leaves the previous file or the new one.

    Args:
        path: the file; its folder must exist.
        model: its `state_dict` is saved in the dtypes that it has, `get_extra_state` included.
        optimizer: any `torch.optim` optimizer; None saves none.
        step: training steps completed.
        config: JSON-able; compared by `load_checkpoint`.
        extra: JSON-able; handed back by `load_checkpoint`.
        write: False in the processes that only bring their parts of sharded tensors.

    Raises:
        CheckpointError: an extra state or optimizer state of objects other than tensors, numbers, strings, None and
            lists, tuples and dicts of these.
    """
    safetensors = require("safetensors.torch")
    packer = _Packer()
    meta: dict = {"format": _FORMAT, "step": step, "config": dict(config or {}), "extra": dict(extra or {})}
    meta["model"] = {name: packer.pack(value, f"model.{name}") for name, value in model.state_dict().items()}
    if optimizer is not None:
        state = packer.pack(optimizer.state_dict()["state"], "optimizer")
        meta["optimizer"] = {"state": state, "sizes": _group_sizes(optimizer)}
    if not write:
        return
    meta["crc32"] = _checksum(packer.tensors)
    metadata = {"ctxkern": json.dumps(meta)}
    write_atomic(path, lambda temporary: safetensors.save_file(packer.tensors, temporary, metadata=metadata))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    safetensors = require("safetensors")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {printable(path)}")
    try:
        with utf8_alias(path.parent) as folder, safetensors.safe_open(folder / path.name, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{printable(path)} is damaged or no safetensors file: {error}") from error


def _read_meta(path: Path) -> dict:
    with _open(path) as file:
        meta = json.loads((file.metadata() or {}).get("ctxkern", "{}"))
    if meta.get("format") != _FORMAT:
        found = meta.get("format")
        raise CheckpointError(
            f"{printable(path)} is no checkpoint of this version: its format is {found!r}; it must be {_FORMAT!r}"
        )
    return meta


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    meta = _read_meta(path)
    with _open(path) as file:
        # copies lie as other tensors do: sums of torch depend on that
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if _checksum(tensors) != meta["crc32"]:
        raise CheckpointError(f"{printable(path)} is damaged: the checksum of its tensors differs from the stored one")
    return tensors, meta


def read_step(path: str | os.PathLike) -> int:
    """The step of a checkpoint, without its tensors.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    return _read_meta(Path(path))["step"]


def check_config(stored: Mapping, given: Mapping, where: object) -> None:
    """Raise `CheckpointError` naming each key whose values differ, with both values."""
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
    """Read a checkpoint into `model` (and `optimizer`) in place, bit for bit.

    Raises:
        CheckpointError: no such file; damaged; `config` is given and differs from the stored one; tensors of other
            names or shapes than the model has; no optimizer state, or of another number of parameters.
    """
    path = Path(path)
    tensors, meta = _read(path)
    if config is not None:
        check_config(meta["config"], json.loads(json.dumps(dict(config))), printable(path))
    states = {name: _unpack(value, tensors) for name, value in meta["model"].items()}
    expected = model.state_dict()
    for name in sorted({*states, *expected}):
        there, here = (_describe(side, name) for side in (states, expected))
        if there != here:
            raise CheckpointError(
                f"{printable(path)} does not fit the model: {name} is {there} there and {here} in the model"
            )
    if optimizer is not None:
        _load_optimizer(path, optimizer, tensors, meta)
    model.load_state_dict({name: _shared_out(value, expected[name]) for name, value in states.items()})
    return Checkpoint(meta["step"], meta["config"], meta["extra"])


def _shared_out(value: Any, like: Any) -> Any:
    """A whole tensor as the DTensor that `like` is, where it is one and they have one shape."""
    if not hasattr(like, "full_tensor") or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    return torch.distributed.tensor.distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _describe(state: Mapping[str, object], name: str) -> object:
    """The shape of a tensor; an extra state may be of any kind."""
    if name not in state:
        return "absent"
    value = state[name]
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not name.endswith("_extra_state") else "present"


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, tensors: Mapping, meta: Mapping) -> None:
    if "optimizer" not in meta:
        raise CheckpointError(f"{printable(path)} holds no optimizer state")
    sizes, stored = _group_sizes(optimizer), meta["optimizer"]
    if sizes != stored["sizes"]:
        raise CheckpointError(f"{printable(path)}: parameter groups of {stored['sizes']} there and {sizes} here")
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _shared_out(value, parameters[number]) for name, value in values.items()}
        for number, values in _unpack(stored["state"], tensors).items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})

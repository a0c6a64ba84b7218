"""What was attached, in files: safetensors for the tensors, JSON for how they were attached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctxkern.nn.factors import BilinearFactors
from ctxkern.ops import distributed
from ctxkern.serve.int8 import parts, quantize_bilinear

from .attaching import attach_adapters, attach_contexts
from .layers import ContextLayer
from .targets import matching, unwrapped
from .using import attached_layers, is_attached

TENSORS, SETTINGS, VERSION = "attached.safetensors", "attached.json", 1


def save_attached(model: nn.Module, folder: str | Path) -> None:
    """Writes what was attached to a model, and nothing of the model itself, into `folder`, which is made.

    attached.safetensors holds the tensors by layer, attached.json how each layer was attached and the shape of its
    weight, by which `load_attached` knows a model that does not fit. Of a model that FSDP2 or tensor parallelism shards
    (DTensors), every process must call this; the tensors are gathered one by one, and the first process of the mesh
    writes them before any of them returns.

    Raises:
        TypeError, ValueError: no module, or no attached layer. ImportError: no safetensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_attached(model, folder.name)
    """
    from safetensors.torch import save_file

    layers = attached_layers("save_attached", model)
    settings = {
        "version": VERSION,
        "model": model_name(model) or type(model).__name__,
        "layers": {n: _settings(m) for n, m in layers.items()},
    }
    named = {f"{name}.{added}": t for name, layer in layers.items() for added, t in _tensors(layer).items()}
    with gathered(named, model) as tensors:
        if tensors is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(tensors, str(Path(folder) / TENSORS))
            (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_attached(model: nn.Module, folder: str | Path) -> list[str]:
    """Attaches to a model what `save_attached` wrote and freezes the rest, or fills what is attached already.

    Args:
        model: one whose layers have the names and the shapes of the model that was saved.
        folder: where the files lie.

    Returns:
        The names of the layers.

    Raises:
        FileNotFoundError: no such files. TypeError: model is no module. ValueError: damaged files or ones of another
        version, or layers that are not there, are of another shape, or have something else attached. ImportError: no
        safetensors. The model is then as it was.

    Example:
        >>> model, other = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_attached(model, folder.name)
        >>> load_attached(other, folder.name)
        ['0']
    """
    op = "load_attached"
    settings = read_json(op, Path(folder) / SETTINGS)
    if settings.get("version") != VERSION:
        raise ValueError(f"{op}: {SETTINGS} has version {settings.get('version')}; it must be {VERSION}")
    tensors = read_tensors(op, Path(folder) / TENSORS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    # parts of the model may have been attached to alone
    modules |= {m.attached.name: m for m in model.modules() if is_attached(m)}
    wanted = _layers(op, settings)
    for name, how in wanted.items():
        layer = modules.get(name)
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
            raise ValueError(f"{op}: the files have layer {name!r}; the model has no linear layer of this name")
        if list(layer.weight.shape) != how["weight"]:
            found_shape = list(layer.weight.shape)
            raise ValueError(f"{op}: layer {name!r} has a weight of {found_shape}; the files are for {how['weight']}")
        if is_attached(layer) and _settings(layer) != how:
            raise ValueError(f"{op}: layer {name!r} has {_settings(layer)} attached; the files have {how}")
        for added, shape in how["tensors"].items():
            found = tensors.get(f"{name}.{added}")
            if found is None or list(found.shape) != shape:
                raise ValueError(f"{op}: {TENSORS} lacks {name}.{added} of shape {shape}")
    plain = [name for name in wanted if not is_attached(modules[name])]
    if plain:
        # refused before the first of them is changed
        matching(op, model, lambda name, _: name in plain)
    for name in plain:
        _attach_alone(model, name, wanted[name])
    with torch.no_grad():
        for name in wanted:
            for added, t in _tensors(modules[name]).items():
                fill(t, tensors[f"{name}.{added}"])
    return list(wanted)


def read_json(op: str, path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError: no file. ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{op}: {path.name} holds a {type(found).__name__}; it must hold an object")
    return found


def read_tensors(op: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: no file. ValueError: it is damaged. ImportError: no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{op}: {path.name} cannot be read: {error}") from error


def _layers(op: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How each layer was attached, as `_settings` gives it."""
    keys = {"contexts": {"context_dim", "rank"}, "adapters": {"adapters", "rank", "alpha"}}
    layers = settings.get("layers")
    known = isinstance(layers, dict) and all(
        isinstance(how, dict)
        and how.get("kind") in keys
        and keys[how["kind"]] | {"dtype", "weight", "tensors"} <= how.keys()
        and isinstance(how["tensors"], dict)
        for how in layers.values()
    )
    if not known:
        raise ValueError(f"{op}: {SETTINGS} has other layers than save_attached writes; it must be one of its files")
    return cast(dict[str, dict[str, Any]], layers)


@contextmanager
def gathered(named: dict[str, Tensor], model: nn.Module) -> Iterator[dict[str, Tensor] | None]:
    """The tensors of a model, whole, for the process that writes them; None for the others, which wait until it has,
    where the model is sharded.

    Raises:
        RuntimeError: on the others, where writing failed.
    """
    if not distributed(named.values()):
        if isinstance(model, DistributedDataParallel) and torch.distributed.get_rank(model.process_group):
            yield None
            return
        yield {name: t.detach().contiguous() for name, t in named.items()}
        return
    from .placed import all_or_none, gather

    tensors, mesh = gather(named)
    with all_or_none(mesh):
        yield tensors


def whole(t: Tensor) -> Tensor:
    """The tensor itself, or one with all parts of a sharded one."""
    return t.full_tensor() if distributed((t,)) else t  # type: ignore[attr-defined]


def fill(t: Tensor, values: Tensor) -> None:
    """Writes what every process has whole into a tensor, or this process's part of it into a sharded one."""
    if distributed((t,)):
        from .placed import sharded_like

        values = sharded_like(t, values)
    if values is not t:
        t.copy_(values)


def model_name(model: nn.Module) -> str | None:
    """That of the hub or folder that the model came from, where it says so."""
    return getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None) or None


def _attach_alone(model: nn.Module, name: str, how: dict[str, Any]) -> None:
    dtype = getattr(torch, how["dtype"])
    meant = lambda other, _: other == name  # noqa: E731
    if how["kind"] == "contexts":
        int8 = dtype is torch.int8
        attach_contexts(model, how["context_dim"], meant, rank=how["rank"], dtype=None if int8 else dtype)
        if int8:
            quantize_bilinear(model.get_submodule(name))
    else:
        attach_adapters(model, how["adapters"], how["rank"], meant, alpha=how["alpha"], dtype=dtype)


def _tensors(layer: Any) -> dict[str, Tensor]:
    """Of what was added, by name within the layer."""
    found = layer.state_dict(keep_vars=True)
    return {name: t for name, t in found.items() if name.split(".")[0] in layer.attached.added}


def _settings(layer: Any) -> dict[str, Any]:
    tensors = _tensors(layer)
    known = {"weight": list(layer.weight.shape), "tensors": {name: list(t.shape) for name, t in tensors.items()}}
    if isinstance(layer, ContextLayer):
        factors = layer.bilinear if isinstance(layer.bilinear, BilinearFactors) else None
        first = parts(layer.bilinear)[0] if factors is None else factors.in_factor
        size = layer.bilinear.shape[2] if factors is None else factors.context_factor.shape[0]
        how = {"kind": "contexts", "context_dim": size, "rank": factors and factors.rank}
    else:
        first = layer.lora_A
        how = {"kind": "adapters", "adapters": len(first), "rank": first.shape[1], "alpha": layer.attached.alpha}
    return how | {"dtype": str(first.dtype).removeprefix("torch.")} | known

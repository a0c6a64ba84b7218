"""A TaskWeaver in a folder: its settings and its hypernetwork; the language model is named, not copied."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ctxkern
from ctxkern.attach.files import model_name
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_atomic, write_json_atomic
from ctxkern.experiments.core.hub import load_language_model
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver, TaskWeaverConfig

CONFIG, TENSORS, LEGACY = "config.json", "model.safetensors", "pytorch_model.bin"


def save(weaver: TaskWeaver, place: Path) -> None:
    """`TaskWeaver.save_pretrained`."""
    place.mkdir(parents=True, exist_ok=True)
    write = require("safetensors.torch").save_file
    tensors = {name: t.detach().contiguous() for name, t in _own(weaver).items()}
    write_atomic(place / TENSORS, lambda path: write(tensors, path, metadata={"format": "pt"}))
    settings = {name: getattr(weaver.config, name) for name in TaskWeaverConfig.names()}
    # a model that was loaded by the caller says itself where it came from
    settings["model_name"] = model_name(weaver.lm) or settings["model_name"]
    write_json_atomic(place / CONFIG, settings | {"model_type": "taskweaver", "shapes": _shapes(weaver)})


def load(place: Path, other: str | None, device: str, lm: Any) -> TaskWeaver:
    """`TaskWeaver.from_pretrained`."""
    config, shapes = _read_config(place)
    tensors = _read_tensors(place)
    name = other or config.model_name
    if lm is None:
        lm, _ = load_language_model(name, torch.device(device), torch.float32)
    else:
        name = model_name(lm) or other or type(lm).__name__
    trained = f"{printable(place)} was trained on {config.model_name!r}"
    try:
        weaver = TaskWeaver(lm, replace(config, model_name=name))
    except ValueError as error:
        raise ValueError(f"the language model {name!r} does not fit, {trained}: {error}") from error
    found = _shapes(weaver)
    if shapes is not None and shapes != found:
        ctxkern.detach(lm)
        raise ValueError(f"the language model {name!r} has {_said(found)}; {trained}, which has {_said(shapes)}")
    own = _own(weaver)
    for key in [*tensors, *own]:
        if key not in own or key not in tensors:
            where = "is in the file alone" if key not in own else "is missing"
            raise ValueError(f"{printable(place)}: {key!r} {where}; it must hold the hypernetwork of its {CONFIG}")
        if tensors[key].shape != own[key].shape:
            shape, expected = list(tensors[key].shape), list(own[key].shape)
            raise ValueError(f"{printable(place)}: {key!r} has the shape {shape}; it must be {expected}")
    with torch.no_grad():
        for key, t in own.items():
            t.copy_(tensors[key])
    return weaver.to(device).eval()


def _own(weaver: TaskWeaver) -> dict[str, Tensor]:
    """The tensors of the hypernetwork, the module's own."""
    return {name: t for name, t in weaver.named_parameters() if not name.startswith("lm.")}


def _shapes(weaver: TaskWeaver) -> dict[str, Any]:
    return {
        "lm_hidden": weaver.project.in_features,
        "layers": weaver.layers.num_embeddings,
        "targets": {name: [target.d_out, target.d_in] for name, target in weaver.targets.items()},
    }


def _said(shapes: dict[str, Any]) -> str:
    sizes = sorted({tuple(shape) for shape in shapes["targets"].values()})
    weights = " and ".join(str(list(shape)) for shape in sizes)
    return f"width {shapes['lm_hidden']}, {len(shapes['targets'])} target layers with weights {weights}"


def load_config(place: Path) -> TaskWeaverConfig:
    """The settings of a folder of `save_pretrained`.

    Raises:
        ValueError: there are none.
    """
    return _read_config(place)[0]


def _read_config(place: Path) -> tuple[TaskWeaverConfig, dict | None]:
    try:
        stored = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.get("model_type", "taskweaver") != "taskweaver":
            found = stored.get("model_type") if isinstance(stored, dict) else type(stored).__name__
            raise ValueError(f"model_type is {found!r}; it must be 'taskweaver', as save_pretrained writes it")
        if "experiment" in stored:
            raise ValueError(
                "it is of a run without a hypernetwork: one that has not come to its end, or has other --weights"
            )
        shapes = stored.get("shapes")
        if shapes is not None and not _are_shapes(shapes):
            raise ValueError("shapes is not as save_pretrained writes it")
        config = TaskWeaverConfig(**{name: stored[name] for name in TaskWeaverConfig.names() if name in stored})
    except FileNotFoundError:
        raise ValueError(f"{printable(place)} has no {CONFIG}; it must be a folder of save_pretrained") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{printable(place / CONFIG)} cannot be read: {error}") from error
    return config, shapes


def _are_shapes(shapes: Any) -> bool:
    return (
        isinstance(shapes, dict)
        and isinstance(shapes.get("targets"), dict)
        and {"lm_hidden", "layers"} <= shapes.keys()
        and all(isinstance(shape, list) and len(shape) == 2 for shape in shapes["targets"].values())
    )


def _read_tensors(place: Path) -> dict[str, Tensor]:
    path = place / (TENSORS if (place / TENSORS).exists() else LEGACY)
    if not path.exists():
        raise ValueError(f"{printable(place)} has neither {TENSORS} nor {LEGACY}; it must have one")
    try:
        if path.name == TENSORS:
            return require("safetensors.torch").load_file(path)
        # no code of the file is run
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{printable(path)} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise ValueError(f"{printable(path)} holds something else than tensors by name; it must hold a state_dict")
    return {name: t for name, t in found.items() if not name.startswith("lm.")}

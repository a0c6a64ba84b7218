"""An adapter of a bank in PEFT's files and back: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import fill, gathered, model_name, read_json, read_tensors, whole
from .layers import AdapterLayer
from .targets import is_conv1d, is_linear, unwrapped
from .using import attached_layers

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_NAME = re.compile(re.escape(PREFIX) + r"(?P<layer>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight")
# what a file may ask for and a bank does not compute: the values that ask for nothing
_NOTHING: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # others change the base model too; PEFT says True of what it has converted
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def export_adapter(model: nn.Module, i: int, folder: str | Path) -> None:
    """Writes an adapter of a bank as PEFT writes it, so that PEFT and what reads its files, vLLM for one, can load it.
    Of a sharded model, every process must call this, as `save_attached`.

    Args:
        model: a module with layers of `attach_adapters`.
        i: the number of the adapter.
        folder: where the files go; it is made.

    Raises:
        TypeError, ValueError: a model without such layers, or a number that is not there. ImportError: no safetensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> folder = tempfile.TemporaryDirectory()
        >>> export_adapter(model, 1, folder.name)
    """
    layers = _bank("export_adapter", model, i)
    alphas = {name: float(whole(layer.lora_scale)[i]) * layer.lora_A.shape[1] for name, layer in layers.items()}
    write_weights(model, {name: (layer.lora_A[i], layer.lora_B[i]) for name, layer in layers.items()}, alphas, folder)


def write_weights(
    model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float], folder: str | Path
) -> None:
    """PEFT's files of A [r, D] and B [E, r], and alpha, of layers of a model by name."""
    from safetensors.torch import save_file

    tensors, ranks = {}, {}
    for name, (A, B) in weights.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        ranks[name] = A.shape[0]
    first, plain = next(iter(weights)), unwrapped(model)
    modules = dict(plain.named_modules())
    for name in weights:
        if name not in modules:
            raise ValueError(f"export_adapter: layer {name!r} was attached in a part of the model; it takes that part")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model_name(model),
        "r": ranks[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "lora_alpha": alphas[first],
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": _targets(plain, list(weights)),
        "fan_in_fan_out": all(is_conv1d(modules[name]) for name in weights),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }
    with gathered(tensors, model) as written:
        if written is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(written, str(Path(folder) / TENSORS), metadata={"format": "pt"})
            (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_adapter(model: nn.Module, i: int, folder: str | Path) -> None:
    """Reads an adapter that PEFT wrote, or `export_adapter`, into a bank; what its rank lacks of the bank's are zeros.

    Args:
        model: a module with layers of `attach_adapters`, the same as in the files.
        i: the number that the adapter gets in the bank; what was there is lost.
        folder: where the files lie.

    Raises:
        TypeError, ValueError: a model without such layers, a number that is not there, files with other layers, shapes
        or a larger rank, damaged ones, or with what a bank does not compute (DoRA, biases, modules saved whole, a
        start that changes the base model, as PiSSA's). FileNotFoundError: no such files. ImportError: no safetensors.
        The bank is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> folder = tempfile.TemporaryDirectory()
        >>> export_adapter(model, 1, folder.name)
        >>> import_adapter(model, 2, folder.name)
        >>> bool((model[0].lora_A[1] == model[0].lora_A[2]).all())
        True
    """
    op = "import_adapter"
    layers = _bank(op, model, i)
    config = read_json(op, Path(folder) / CONFIG)
    for key, nothing in _NOTHING.items():
        if key in config and config[key] not in nothing:
            raise ValueError(f"{op}: {CONFIG} has {key} {config[key]!r}; it must be {nothing[0]!r}")
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in read_tensors(op, Path(folder) / TENSORS).items():
        match = _NAME.fullmatch(key)
        if match is None:
            raise ValueError(f"{op}: {TENSORS} has {key!r}; it must hold lora_A and lora_B of linear layers alone")
        found.setdefault(match["layer"], {})[match["which"]] = t
    for name in [*found, *layers]:
        if name not in layers or set(found.get(name, {})) != {"A", "B"}:
            where = "in the files and not in the bank" if name not in layers else "in the bank and not in the files"
            raise ValueError(f"{op}: layer {name!r} is {where}; both must have the same layers")
    for name, layer in layers.items():
        A, B = found[name]["A"], found[name]["B"]
        (_, rank, d_in), d_out = layer.lora_A.shape, layer.lora_B.shape[1]
        if A.dim() != 2 or tuple(B.shape) != (d_out, A.shape[0]) or A.shape[1] != d_in:
            raise ValueError(
                f"{op}: layer {name!r} has A {list(A.shape)} and B {list(B.shape)} in the files; they must be "
                f"[r, {d_in}] and [{d_out}, r]"
            )
        if A.shape[0] > rank:
            raise ValueError(f"{op}: layer {name!r} has rank {A.shape[0]} in the files; the bank takes up to {rank}")
    scales = {name: _scale(op, config, name, found[name]["A"].shape[0]) for name in layers}
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = found[name]["A"], found[name]["B"]
            rank = A.shape[0]
            banks = [whole(t) for t in (layer.lora_A, layer.lora_B, layer.lora_scale)]
            banks[0][i].zero_()[:rank].copy_(A)
            banks[1][i].zero_()[:, :rank].copy_(B)
            banks[2][i] = scales[name]
            for t, bank in zip((layer.lora_A, layer.lora_B, layer.lora_scale), banks, strict=True):
                fill(t, bank)


def _bank(op: str, model: nn.Module, i: int) -> dict[str, AdapterLayer]:
    found = {name: layer for name, layer in attached_layers(op, model).items() if isinstance(layer, AdapterLayer)}
    if not found:
        raise ValueError(f"{op}: model has no layer of attach_adapters; it must have one")
    if not isinstance(i, int) or isinstance(i, bool):
        raise TypeError(f"{op}: i is a {type(i).__name__}; it must be an int")
    for name, layer in found.items():
        if not 0 <= i < len(layer.lora_A):
            raise ValueError(f"{op}: i is {i}; layer {name!r} has adapters 0 to {len(layer.lora_A) - 1}")
    return found


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """As PEFT takes them: the last parts of the names where these mean the same layers, else the whole names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = [name for name, m in model.named_modules() if is_linear(m) and name.rpartition(".")[2] in ends]
    return ends if sorted(meant) == sorted(names) else names


def _scale(op: str, config: dict[str, Any], name: str, rank: int) -> float:
    alpha: Any = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{op}: {CONFIG} has the alpha {alpha!r} for layer {name!r}; it must be a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that the end of a name fits, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default

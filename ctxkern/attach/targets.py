"""Which layers of a model are meant: by name, glob, regular expression or predicate."""

from __future__ import annotations

import fnmatch
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctxkern.ops import distributed

from .using import is_attached

Target: TypeAlias = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Targets: TypeAlias = Target | Iterable[Target]


def matching(op: str, model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """{qualified name: layer} of the linear layers that any of the targets means, in the order of the model.

    A string means a layer by its whole name, by the last parts of it ("q_proj", "self_attn.q_proj") or as a glob
    ("*.layers.[0-3].*_proj"); a compiled expression has to match the whole name; a predicate is given name and layer.

    Raises:
        TypeError: a target of another type. ValueError: a target that means no linear layer, or one that cannot be
        attached to: quantised or of another subclass, with a forward of its own, attached already, or tied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    wrapped = wrapper(model)
    if wrapped:
        raise ValueError(f"{op}: model is in {wrapped} already; it must be attached to before it is wrapped or sharded")
    single = isinstance(targets, (str, re.Pattern)) or callable(targets)
    given = [targets] if single else list(targets)
    if not given:
        raise ValueError(f"{op}: targets is empty; it must mean a layer")
    modules = dict(unwrapped(model).named_modules(remove_duplicate=False))
    names = [name for name, module in modules.items() if is_linear(module)]
    found: set[str] = set()
    for target in given:
        means = _meaning(op, target)
        meant = {name for name in names if means(name, modules[name])}
        if not meant:
            raise ValueError(f"{op}: targets has {_shown(target)}, {_nothing(means, modules, names)}")
        found |= meant
    layers = {name: modules[name] for name in names if name in found}
    for name, layer in layers.items():
        reason = _refusal(name, layer, modules)
        if reason:
            raise ValueError(f"{op}: layer {name!r} {reason}")
    return layers


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear or transformers' Conv1D, of a subclass too."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with weight [D, E]; imports nothing."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def wrapper(model: nn.Module, fully_sharded: bool = False) -> str | None:
    """The name of what spreads the model over processes and knows its parameters; fully_sharded: of FSDP alone."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds: dict[str, Any] = {} if fully_sharded else {"DistributedDataParallel": DistributedDataParallel}
    if fsdp is not None:
        kinds |= {"fully_shard": fsdp.FSDPModule, "FullyShardedDataParallel": fsdp.FullyShardedDataParallel}
    for module in model.modules():
        for name, kind in kinds.items():
            if isinstance(module, kind):
                return name
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """What DDP or torch.compile was given."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def tensor_parallel_style(layer: nn.Module) -> tuple[Any, Any] | None:
    """(style, mesh) of a layer that transformers computes in parallel by a forward on the instance."""
    loaded = sys.modules.get("transformers.distributed.tensor_parallel")
    forward = vars(layer).get("forward")
    if loaded is None or not inspect.isfunction(forward):
        return None
    known = inspect.getclosurevars(forward).nonlocals
    return (known["self"], known["mesh"]) if isinstance(known.get("self"), loaded.TensorParallelLayer) else None


def _meaning(op: str, target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        return lambda name, _: name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)
    if isinstance(target, re.Pattern):
        return lambda name, _: target.fullmatch(name) is not None
    if callable(target):
        return target
    raise TypeError(
        f"{op}: targets has a {type(target).__name__}; it must hold names, globs, compiled regular expressions or "
        "predicates"
    )


def _shown(target: Target) -> str:
    return repr(target) if isinstance(target, str) else str(target)


def _nothing(means: Callable[[str, nn.Module], bool], modules: dict[str, nn.Module], names: list[str]) -> str:
    other = next((name for name, module in modules.items() if name and means(name, module)), None)
    if other is not None:
        return f"which means {other!r}, a {type(modules[other]).__name__}; it must mean an nn.Linear or a Conv1D"
    ends = sorted({name.rpartition(".")[2] for name in names})
    return f"which means no layer; linear layers of this model are called {', '.join(ends) or 'nothing: it has none'}"


def _refusal(name: str, layer: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    if is_attached(layer):
        return f"is attached already, as a {type(layer).__name__}; it must be plain: detach it first"
    if type(layer) is not nn.Linear and not (
        is_conv1d(layer) and type(layer).__module__ == "transformers.pytorch_utils"
    ):
        found = type(layer).__name__
        return f"is a {found}; it must be exactly an nn.Linear or a Conv1D, neither quantised nor parametrized"
    if distributed((layer.weight,)):
        from .placed import refusal

        reason = refusal(layer.weight)
        if reason:
            return reason
    if "forward" in vars(layer) and not tensor_parallel_style(layer):
        return "has a forward of its own on the instance; it must have that of its class"
    if not layer.weight.is_floating_point():
        return f"has a weight of {layer.weight.dtype}; it must be of floats, not quantised"
    for other, module in modules.items():
        if module is layer and other != name:
            return f"is {other!r} too; a layer in two places cannot have two names"
        if module is not layer and any(p is layer.weight for p in module._parameters.values()):
            return f"shares its weight with {other!r}; a tied layer must be untied first"
    return None

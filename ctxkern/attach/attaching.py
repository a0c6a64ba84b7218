"""`attach_contexts`, `attach_adapters` and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctxkern.nn.factors import BilinearFactors
from ctxkern.ops import distributed
from ctxkern.serve.int8 import Int8Bilinear, int8_weight

from .layers import AdapterLayer, AttachedLayer, ContextLayer, class_for
from .targets import Targets, is_conv1d, matching, tensor_parallel_style, wrapper
from .using import Attached, Slot, attached_layers, remember_in_checkpoints


def attach_contexts(
    model: nn.Module,
    context_dim: int,
    targets: Targets,
    *,
    rank: int | None = None,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Gives linear layers of a model a weight for each context: W_b = W + Σ_k bilinear[:, :, k] context[b, k].

    In place: each layer stays the same object, with its weight, bias, hooks and names in the state_dict, and gets one
    parameter more, `bilinear`. It starts at zero, so that the model computes what it did whatever the context is, and
    learns from the first step on, as contexts are not zero. Contexts of norm √K learn best, at ten times the learning
    rate of other parameters. `use` says which contexts a forward has.

    Args:
        model: any module; its nn.Linear and transformers' Conv1D layers can be attached to.
        context_dim: K, width of a context.
        targets: which layers: a name, the last parts of one ("q_proj"), a glob, a compiled regular expression, a
            predicate of name and layer, or several of these.
        rank: R, to keep `bilinear` by its CP factors (`ctxkern.nn.BilinearFactors`); None: the whole tensor.
        freeze: whether everything in the model but what is attached stops requiring gradients.
        dtype: of the new parameters; None: that of the weight, float32 where it is a half.

    Returns:
        The names of the layers, in the order of the model.

    Raises:
        TypeError: an argument of another type. ValueError: a target that means no linear layer, a layer that is tied,
        quantised or attached already, a rank or context_dim below 1. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> attach_contexts(model, 16, "0")
        ['0']
        >>> with use(model, context=torch.randn(3, 16)):
        ...     y = model(torch.randn(3, 5, 8))
    """
    op = "attach_contexts"
    _count(op, "context_dim", context_dim, 1)
    if rank is not None:
        _count(op, "rank", rank, 1)
    layers = matching(op, model, targets)
    made = {}
    for name, layer in layers.items():
        d_out, d_in = _features(layer)
        how = {"device": layer.weight.device, "dtype": dtype or _wide(layer.weight.dtype)}
        if rank is None:
            made[name] = {"bilinear": _zeros(layer, "bilinear", (d_in, d_out, context_dim), how)}
        else:
            factors = BilinearFactors(d_in, d_out, context_dim, rank, **how)
            nn.init.zeros_(factors.out_factor)
            for factor, t in list(factors.named_parameters()):
                setattr(factors, factor, _placed(layer, f"bilinear.{factor}", t))
            made[name] = {"bilinear": factors}
    return _attach(model, layers, made, ContextLayer, freeze, None)


def attach_adapters(
    model: nn.Module,
    n_adapters: int,
    rank: int,
    targets: Targets,
    *,
    alpha: float | None = None,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Gives linear layers of a model a bank of LoRA adapters, of which a batch may have any mixture and train it:
    y_b = x_b Wᵀ + (alpha / rank) (x_b A_bᵀ) B_bᵀ + bias.

    In place, as `attach_contexts`; the new parameters are `lora_A` [n, r, D] and `lora_B` [n, E, r]. B starts at zero,
    so that the model computes what it did, bit for bit, whatever the adapter is. `use` says which adapter a sequence
    has.

    Args:
        model, targets, freeze, dtype: as in `attach_contexts`.
        n_adapters: of the bank; 0 for layers whose A and B come from elsewhere (`use(model, lora=...)`).
        rank: r.
        alpha: numerator of the scale; None: r, a scale of 1.

    Returns:
        The names of the layers, in the order of the model.

    Raises:
        As `attach_contexts`.

    Source: Hu et al., LoRA (2021), the initialisation as in PEFT.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> attach_adapters(model, n_adapters=3, rank=2, targets=["0", "2"], alpha=4)
        ['0', '2']
    """
    op = "attach_adapters"
    _count(op, "n_adapters", n_adapters, 0)
    _count(op, "rank", rank, 1)
    layers = matching(op, model, targets)
    made = {}
    for name, layer in layers.items():
        d_out, d_in = _features(layer)
        how = {"device": layer.weight.device, "dtype": dtype or _wide(layer.weight.dtype)}
        A = torch.empty(n_adapters, rank, d_in, **how)
        for each in A:
            nn.init.kaiming_uniform_(each, a=5**0.5)
        made[name] = {
            "lora_A": _placed(layer, "lora_A", nn.Parameter(A)),
            "lora_B": _zeros(layer, "lora_B", (n_adapters, d_out, rank), how),
            "lora_scale": torch.full((n_adapters,), 1.0 if alpha is None else alpha / rank, device=layer.weight.device),
        }
    return _attach(model, layers, made, AdapterLayer, freeze, alpha)


def detach(model: nn.Module, context: Tensor | None = None, adapter: int | None = None) -> list[str]:
    """Makes the attached layers of a model plain again, in place: as they were, or with a context or adapter merged in.

    What attaching froze stays frozen.

    Args:
        model: a module that was attached to.
        context: [K], merged into layers of `attach_contexts`; the merged weight is a new parameter.
        adapter: the number of one, likewise of `attach_adapters`.

    Returns:
        The names of the layers.

    Raises:
        TypeError, ValueError: a model without attached layers, a context or adapter that they do not have, or one for
        which no layer is there. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> detach(model, adapter=1)
        ['0']
    """
    layers = attached_layers("detach", model)
    if wrapper(model, fully_sharded=True):
        raise ValueError(
            "detach: model is sharded by FSDP; it must be whole: save_attached, and load_attached into one that is"
        )
    for name, value, kind in (("context", context, ContextLayer), ("adapter", adapter, AdapterLayer)):
        if value is not None and not any(isinstance(layer, kind) for layer in layers.values()):
            raise ValueError(f"detach: {name} is given and no layer has one; it must be None")
    merged = {}
    for name, layer in layers.items():
        if context is not None and isinstance(layer, ContextLayer):
            merged[name] = _with_context(name, layer, context)
        elif adapter is not None and isinstance(layer, AdapterLayer):
            merged[name] = _with_adapter(name, layer, adapter)
    for name, layer in layers.items():
        attached = layer.attached
        for added in attached.added:
            delattr(layer, added)
        vars(layer).pop("weight_cache", None)
        del layer.attached
        _become(layer, attached.plain)
        if name in merged:
            layer.weight = nn.Parameter(merged[name], layer.weight.requires_grad)
    return list(layers)


@torch.no_grad()
def _with_context(name: str, layer: ContextLayer, context: Tensor) -> Tensor:
    """The weight under a context, in the layout of the layer, in float32 or wider."""
    factors = isinstance(layer.bilinear, BilinearFactors)
    size = (layer.bilinear.context_factor.shape[0],) if factors else tuple(layer.bilinear.shape[2:])
    if tuple(context.shape) != size:
        raise ValueError(f"detach: context has shape {list(context.shape)}; layer {name!r} needs {list(size)}, [K]")
    if factors:
        names = ("in_factor", "context_factor", "out_factor")
        each = zip(names, layer.bilinear.factors(), strict=True)
        d, k, e = (_part(layer, f"bilinear.{factor}", t).to(_wide(t.dtype)) for factor, t in each)
        added = (d * (context.to(k) @ k)) @ e
    elif isinstance(layer.bilinear, Int8Bilinear):
        added = int8_weight(None, layer.bilinear, context)
    else:
        wide = _part(layer, "bilinear", layer.bilinear).to(_wide(layer.bilinear.dtype))
        added = wide @ context.to(wide)
    return _merged(layer, added.mT)


@torch.no_grad()
def _with_adapter(name: str, layer: AdapterLayer, adapter: int) -> Tensor:
    """The weight with an adapter, likewise."""
    if not isinstance(adapter, int) or not 0 <= adapter < len(layer.lora_A):
        raise ValueError(f"detach: adapter is {adapter!r}; layer {name!r} has adapters 0 to {len(layer.lora_A) - 1}")
    A, B, scale = (_part(layer, added, getattr(layer, added)) for added in ("lora_A", "lora_B", "lora_scale"))
    A, B = (t[adapter].to(_wide(t.dtype)) for t in (A, B))
    added = B @ A * scale[adapter]
    return _merged(layer, added)


def _merged(layer: AttachedLayer, added: Tensor) -> Tensor:
    """The weight plus `added` [E, D], this process's part of both, in the layout and dtype of the layer."""
    weight = layer.weight
    local = weight.to_local() if distributed((weight,)) else weight
    found = (local.to(added) + (added.mT if is_conv1d(layer) else added)).to(weight.dtype).contiguous()
    if distributed((weight,)):
        from .placed import like

        return like(weight, found)
    return found


def _part(layer: AttachedLayer, added: str, t: Tensor) -> Tensor:
    """This process's part of an added tensor: the whole where nothing is sharded."""
    if not distributed((layer.weight,)):
        return t
    from . import placed

    return placed.part(layer, added, t)


def _zeros(layer: nn.Module, added: str, shape: tuple[int, ...], how: dict[str, Any]) -> nn.Parameter:
    if not distributed((layer.weight,)):
        return nn.Parameter(torch.zeros(shape, **how))
    from . import placed

    return nn.Parameter(placed.zeros(layer, added, shape, how["dtype"]))


def _placed(layer: nn.Module, added: str, t: nn.Parameter) -> nn.Parameter:
    """The parameter, sharded as the weight is."""
    if not distributed((layer.weight,)):
        return t
    from . import placed

    return nn.Parameter(placed.distributed(layer, added, t.data))


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Of another class, under the same wrapper where transformers has put a forward on the instance."""
    found = tensor_parallel_style(layer)
    layer.__class__ = kind
    if found:
        style, mesh = found
        del layer.forward
        style.install_forward(layer, mesh)


def _attach(
    model: nn.Module,
    layers: dict[str, nn.Module],
    made: dict[str, dict[str, object]],
    kind: type[AttachedLayer],
    freeze: bool,
    alpha: float | None,
) -> list[str]:
    before = [m for m in model.modules() if isinstance(m, AttachedLayer)]
    slot = before[0].attached.slot if before else Slot()
    if freeze:
        kept = {id(p) for m in before for name, p in m.named_parameters() if name.split(".")[0] in m.attached.added}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
    for name, layer in layers.items():
        for added, value in made[name].items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                layer.register_buffer(added, value)
            else:
                setattr(layer, added, value)
        layer.attached = Attached(name, slot, type(layer), tuple(made[name]), alpha)
        _become(layer, class_for(type(layer), kind))
    remember_in_checkpoints()
    return list(layers)


def _features(layer: nn.Module) -> tuple[int, int]:
    """(E, D)."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_conv1d(layer) else (rows, columns)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _count(op: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be an int")
    if value < least:
        raise ValueError(f"{op}: {name} is {value}; it must be at least {least}")

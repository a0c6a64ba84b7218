"""`swap`: einsum layers of a model replaced by fused ones, in place."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .attention import ContextModulatedAttention, EinsumContextModulatedAttention

Convert = Callable[..., nn.Module]


def swap(model: nn.Module, mapping: dict[type[nn.Module], Convert] | None = None) -> list[str]:
    """Swaps the einsum layers of a model for fused ones, in place.

    An EinsumContextModulatedAttention becomes a ContextModulatedAttention and stays the same object: its parameters,
    its hooks and every reference to it remain, and an optimizer built before still trains it. With a mapping, layers
    of exactly the given classes are replaced too. A layer in several places is converted once.

    One warning names the layers that look as if they were meant but are left as they are, with the reason: an einsum
    layer of a subclass, one whose `qkv` is patched, a parametrized layer, and a layer that shares a parameter with
    another module where the conversion would end the sharing.

    Args:
        model: the module whose layers are swapped; an EinsumContextModulatedAttention itself will do.
        mapping: {class: convert}, where convert(layer), or convert(layer, name) if it requires two arguments, returns
            the new layer, or `layer` itself to leave it. Reuse the parameters of `layer` in the new layer where an
            optimizer already holds them. Inner layers are converted before the layers that hold them.

    Returns:
        The qualified names of the layers that changed, one for each place.

    Raises:
        TypeError: model is no module, mapping no {class: callable}, or convert returned no module.
        ValueError: the model itself is of a class of the mapping: there is no parent to put the new layer into.
        Whatever convert raises, and the warning where warnings are errors. The model is then as it was.

    Example:
        >>> model = nn.ModuleDict({"attention": EinsumContextModulatedAttention(8, 4), "head": nn.Linear(8, 6)})
        >>> def convert(layer, name):
        ...     return ModulatedLinear.from_linear(layer, context_dim=4) if name == "head" else layer
        >>> swap(model, {nn.Linear: convert})
        ['attention', 'head']
    """
    mapping = _checked(model, mapping)
    layers, left = [], []
    for name, layer in model.named_modules(remove_duplicate=False):
        reason = _reason_to_leave(layer, mapping)
        if reason:
            left.append((name, reason))
        elif type(layer) in mapping or type(layer) is EinsumContextModulatedAttention:
            layers.append((name, layer))
    conversion = _Conversion(model, mapping, layers)
    replaced = []
    try:
        # inner layers first, so that the conversion of an outer one finds them converted
        for name, layer in reversed(layers):
            new = conversion.of(layer) if type(layer) in mapping else layer
            if new is not layer:
                path, _, last = name.rpartition(".")
                parent = model.get_submodule(path)
                replaced.append((parent, last, layer))
                setattr(parent, last, new)
        left += conversion.left
        if left:
            reasons = "; ".join(f"{name!r} {reason}" if name else f"the model {reason}" for name, reason in left)
            warnings.warn(f"swap: left as they are: {reasons}", stacklevel=2)
    except BaseException:
        for parent, last, layer in reversed(replaced):
            setattr(parent, last, layer)
        raise
    for _, layer in layers:
        if type(layer) not in mapping:
            layer.__class__ = ContextModulatedAttention
    return [name for name, layer in layers if conversion.new.get(layer) is not layer]


def _checked(model: nn.Module, mapping: dict[type[nn.Module], Convert] | None) -> dict[type[nn.Module], Convert]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}; it must be a torch.nn.Module")
    if mapping is not None and not isinstance(mapping, dict):
        raise TypeError(f"swap: mapping is a {type(mapping).__name__}; it must be a dict {{class: convert}}")
    mapping = mapping or {}
    for cls, convert in mapping.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"swap: mapping has the key {cls!r}; it must be a class of modules")
        if not callable(convert):
            raise TypeError(f"swap: mapping[{cls.__name__}] is {convert!r}; it must be a callable: layer to new layer")
    if type(model) in mapping:
        raise ValueError(
            f"swap: model is itself a {type(model).__name__}; it must be a module that holds one: call its convert"
        )
    return mapping


def _reason_to_leave(layer: nn.Module, mapping: dict[type[nn.Module], Convert]) -> str:
    """Why a layer that looks as if it was meant is left as it is, or ""."""
    cls = type(layer)
    if cls in mapping:
        return ""
    if is_parametrized(layer) and (cls.__bases__[0] in mapping or isinstance(layer, EinsumContextModulatedAttention)):
        return "is parametrized: swap it before, or remove the parametrization"
    if not isinstance(layer, EinsumContextModulatedAttention):
        return ""
    if "qkv" in vars(layer):
        return "has its own qkv"
    if cls is EinsumContextModulatedAttention:
        return ""
    changed = [
        name for name in ("forward", "qkv") if getattr(cls, name) is not getattr(EinsumContextModulatedAttention, name)
    ]
    if changed:
        return f"is a {cls.__name__}, which overrides {' and '.join(changed)}"
    return f"is a {cls.__name__}, a subclass: give the mapping a convert for it"


class _Conversion:
    """The new layers of a mapping's conversions, each made once."""

    def __init__(
        self, model: nn.Module, mapping: dict[type[nn.Module], Convert], layers: list[tuple[str, nn.Module]]
    ) -> None:
        self.mapping = mapping
        self.new: dict[nn.Module, nn.Module] = {}
        self.left: list[tuple[str, str]] = []
        self.names: dict[nn.Module, str] = {}
        self.inside = {}
        for name, layer in layers:
            if type(layer) in mapping and layer not in self.names:
                self.names[layer] = name
                self.inside[layer] = set(layer.modules())
        # of each parameter, by id, the modules that hold it
        self.holders: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self.holders.setdefault(id(parameter), set()).add(module)
        self.known = set(model.modules())

    def of(self, layer: nn.Module) -> nn.Module:
        if layer not in self.new:
            self.new[layer] = self._convert(layer)
        return self.new[layer]

    def _convert(self, layer: nn.Module) -> nn.Module:
        name, convert = self.names[layer], self.mapping[type(layer)]
        shared = [p for p in layer.parameters() if self.holders.get(id(p), set()) - self.inside[layer]]
        new = convert(layer, name) if _requires_two(convert) else convert(layer)
        if not isinstance(new, nn.Module):
            raise TypeError(
                f"swap: the conversion of {name!r} gave a {type(new).__name__}; it must be a torch.nn.Module"
            )
        if new is layer:
            return layer
        kept = {id(p) for p in new.parameters()}
        if any(id(p) not in kept for p in shared):
            self.left.append((name, "shares a parameter with another module, which its conversion does not keep"))
            return layer
        for module in new.modules():
            if module not in self.known:
                module.training = layer.training
                self.known.add(module)
        return new


def _requires_two(convert: Convert) -> bool:
    """Whether a callable cannot be called with the layer alone, and so takes its name too."""
    try:
        signature = inspect.signature(convert)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False

"""`swap`: einsum layers of a model replaced by fused ones, in place."""

from torch import nn

from .attention import ContextModulatedAttention, EinsumContextModulatedAttention


def swap(model, mapping=None):
    """Swaps the einsum layers of a model for fused ones, in place, and returns their qualified names.

    An EinsumContextModulatedAttention becomes a ContextModulatedAttention and stays the same object: its parameters,
    hooks and every reference to it remain, an optimizer built before goes on. With a mapping, layers of exactly the
    given classes are replaced too: `swap(model, {TheirClass: convert})`, convert(layer) → new layer; reuse the old
    layer's parameters in it if an optimizer already holds them. A layer in several places is converted once.

    Raises:
        TypeError: model is no module, mapping no {class: callable}, or convert returns no module.
        ValueError: the model itself is of a class of the mapping (there is no parent to put the new layer into).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}, takes a torch.nn.Module")
    if mapping is not None and not isinstance(mapping, dict):
        raise TypeError(f"swap: mapping is a {type(mapping).__name__}, takes a dict {{class: convert}}")
    mapping = mapping or {}
    for cls, convert in mapping.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"swap: mapping has the key {cls!r}, takes classes of modules")
        if not callable(convert):
            raise TypeError(
                f"swap: mapping[{cls.__name__}] is {convert!r}, takes a callable convert(layer) → new layer"
            )
    if type(model) in mapping:
        raise ValueError(
            f"swap: model itself is a {type(model).__name__}: call its convert, takes a model that holds it"
        )
    layers = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False)]
    layers = [(n, m) for n, m in layers if type(m) in mapping or type(m) is EinsumContextModulatedAttention]
    converted, replaced = {}, []
    try:
        # inner layers first, so that the conversion of an outer one finds them swapped
        for name, layer in reversed(layers):
            if type(layer) in mapping:
                if id(layer) not in converted:
                    converted[id(layer)] = _convert(layer, mapping[type(layer)], name)
                path, _, last = name.rpartition(".")
                parent = model.get_submodule(path)
                replaced.append((parent, last, layer))
                setattr(parent, last, converted[id(layer)])
    except BaseException:
        for parent, last, layer in replaced:
            setattr(parent, last, layer)
        raise
    for _, layer in layers:
        if type(layer) not in mapping:
            layer.__class__ = ContextModulatedAttention
    return [name for name, _ in layers]


def _convert(layer, convert, name):
    new = convert(layer)
    if not isinstance(new, nn.Module):
        raise TypeError(f"swap: the conversion of {name!r} gave a {type(new).__name__}, takes a torch.nn.Module")
    return new.train(layer.training)

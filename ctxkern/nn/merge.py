"""`merge`: a copy of a model specialised to one context, in plain torch."""

import copy

import torch

from .attention import _ContextAttention
from .linear import ModulatedLinear
from .plain import MergedAttention, MergedLinear


def merge(model, context):
    """A copy of `model` in which every context-modulated layer has its weight for `context` made once and for all.

    The copy runs plain torch (no operator of ctxkern) and is called as before; its layers' context argument is optional
    and unused. `bilinear` tensors are not copied. `model` stays as it is.

    Args:
        model: a module with ContextModulatedAttention, EinsumContextModulatedAttention or ModulatedLinear layers, or
            one such layer.
        context: [K] or [1, K].

    Raises:
        TypeError: model is no module or context no tensor. ValueError: context has another size than a layer takes, or
        the model has no such layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"merge: model is a {type(model).__name__}, takes a torch.nn.Module")
    if not isinstance(context, torch.Tensor):
        raise TypeError(f"merge: context is a {type(context).__name__}, takes a tensor [K]")
    if context.dim() not in (1, 2) or (context.dim() == 2 and context.shape[0] != 1):
        raise ValueError(f"merge: context has shape {list(context.shape)}, takes [K] or [1, K]: one context")
    context = context.detach().reshape(-1)
    replaced = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _ContextAttention | ModulatedLinear):
            if layer.context_dim != len(context):
                where = f"layer {name!r}" if name else "the layer"
                raise ValueError(f"merge: context has {len(context)} entries, {where} takes {layer.context_dim}")
            replaced[id(layer)] = _merged(layer, context)
    if not replaced:
        raise ValueError(
            "merge: model has no ContextModulatedAttention, EinsumContextModulatedAttention or ModulatedLinear"
        )
    # deepcopy takes what the memo holds for an object's id instead of copying it
    return copy.deepcopy(model, replaced)


@torch.no_grad()
def merged_weight(weight, bilinear, context):
    """weight + Σ_k bilinear[:, :, k] context[k], [D, E] in the dtype of bilinear; summed in float32 or wider."""
    wide = torch.promote_types(bilinear.dtype, torch.float32)
    total = torch.zeros(bilinear.shape[:2], dtype=wide, device=bilinear.device)
    for row in range(bilinear.shape[0]):
        total[row] = bilinear[row].to(wide) @ context.to(bilinear.device, wide)
    return (total if weight is None else total + weight.to(wide)).to(bilinear.dtype)


def _merged(layer, context):
    if isinstance(layer, ModulatedLinear):
        new = MergedLinear(merged_weight(layer.weight, layer.bilinear, context), copy.deepcopy(layer.bias))
    else:
        made = [(merged_weight(w, t, context), copy.deepcopy(b)) for w, t, b in zip(*layer.projections(), strict=True)]
        new = MergedAttention(made, layer.n_heads, copy.deepcopy(layer.W_o), layer.is_causal, layer.dropout)
    return new.train(layer.training)

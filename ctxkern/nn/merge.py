"""`merge`: a copy of a model specialised to one context, in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ctxkern.serve.int8 import Int8Bilinear, int8_weight

from .attention import ContextAttention, ContextModulatedAttention, EinsumContextModulatedAttention
from .factors import BilinearFactors
from .linear import ModulatedLinear
from .merged import MergedAttention, MergedLinear

_MERGED = (ContextModulatedAttention, EinsumContextModulatedAttention, ModulatedLinear)
# what a call of a layer goes through: with another one of these it may compute something else
_METHODS = ("__call__", "__getattr__", "__getattribute__", "forward", "qkv")
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def merge(model: nn.Module, context: torch.Tensor) -> nn.Module:
    """A copy of a model in which every context-modulated layer has the weights of one context, computed once.

    The copy runs plain torch (no operator of ctxkern) and is called as before; its layers' context arguments are
    optional and unused. Its projections are nn.Linear, which quantisers and adapter libraries find. Training mode,
    dtypes, devices, buffers, shared layers and parameters stay; a merged weight requires a gradient where the layer's
    `weight` does (its `bilinear`, where there is no `weight`). `bilinear` tensors are not copied, and `model` stays as
    it is. A parametrized weight is merged with the value that it has.

    Args:
        model: a module with ContextModulatedAttention, EinsumContextModulatedAttention or ModulatedLinear layers, or
            one such layer.
        context: [K] or [1, K]: what the layers receive, after all that the model makes of its own context argument.

    Returns:
        The copy.

    Raises:
        TypeError: model is no module, context no tensor of floats, or a layer's parameter is a DTensor (FSDP2, tensor
            parallel) or another tensor subclass.
        ValueError: context has another size than a layer's context_dim, the model has no such layer, or the copy could
            compute something else than a layer does: the layer has hooks, overrides or patches its forward, or is
            parametrized and in training mode. The message names the layer.

    Example:
        >>> layer = ModulatedLinear(8, 6, context_dim=4)
        >>> x, context = torch.randn(3, 5, 8), torch.randn(4)
        >>> merged = merge(layer, context)
        >>> torch.allclose(merged(x), layer(x, context.expand(3, 4)), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge: model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(context, torch.Tensor):
        raise TypeError(f"merge: context is a {type(context).__name__}; it must be a tensor [K]")
    if not context.is_floating_point():
        raise TypeError(f"merge: context is {context.dtype}; it must be a floating-point tensor [K]")
    if context.dim() not in (1, 2) or (context.dim() == 2 and context.shape[0] != 1):
        raise ValueError(f"merge: context has shape {list(context.shape)}; it must be [K] or [1, K]: one context")
    layers = {
        layer: name for name, layer in model.named_modules() if isinstance(layer, ContextAttention | ModulatedLinear)
    }
    if not layers:
        raise ValueError(
            "merge: model has no layer to merge; it must have a ContextModulatedAttention, "
            "EinsumContextModulatedAttention or ModulatedLinear"
        )
    for layer, name in layers.items():
        _check(layer, f"layer {name!r}" if name else "the layer", context)
    # deepcopy takes what the memo holds for an object's id instead of copying it
    memo = _computed(model)
    merging = _Merging(context.detach().reshape(-1), memo)
    # inner layers first: an outer one's copy then holds them
    for layer in reversed(layers):
        memo[id(layer)] = merging.linear(layer) if isinstance(layer, ModulatedLinear) else merging.attention(layer)
    return copy.deepcopy(model, memo)


def _check(layer: nn.Module, where: str, context: torch.Tensor) -> None:
    """Raises where `layer` cannot be merged with the same function, saying why."""
    for name, tensor in layer.named_parameters():
        if not name.startswith("W_o.") and is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__
            raise TypeError(f"merge: {name} of {where} is a {kind}; it must be a plain tensor: gather the model first")
    for attribute, hook in _HOOKS.items():
        if getattr(layer, attribute):
            raise ValueError(
                f"merge: {where} has {hook}; it must have none, as the merged layer would not run it: remove it and "
                "register it on the merged layer"
            )
    for method in _METHODS:
        if method in vars(layer):
            raise ValueError(f"merge: {where} has its own {method}; it must be that of its class to be merged")
        if getattr(type(layer), method, None) not in [getattr(known, method, None) for known in _MERGED]:
            kind = type(layer).__name__
            raise ValueError(
                f"merge: {where} is a {kind}, which overrides {method}; it must leave that as it is to be merged"
            )
    modules = [layer, *(m for n, m in layer.named_children() if n != "W_o")]
    if any(m.training and is_parametrized(m) for m in modules):
        raise ValueError(
            f"merge: {where} is parametrized and in training mode; it must be in evaluation mode to be merged, as the "
            "weights may change with each call in training"
        )
    if layer.context_dim != context.numel():
        raise ValueError(f"merge: context has {context.numel()} entries; it must have {layer.context_dim} for {where}")


def _computed(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy with the tensors of a model that are results and not leaves, which it would not copy.

    Pruning and weight_norm keep such: their hooks compute them again at the next call.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(v): v.detach().clone() for v in values if isinstance(v, torch.Tensor) and not v.is_leaf}


class _Merging:
    """Makes merged layers for one context; what the layers share, their merged copies share."""

    def __init__(self, context: torch.Tensor, memo: dict[int, Any]) -> None:
        self.context, self.memo = context, memo
        # the merged weight of each pair (weight, bilinear), which it keeps alive for its ids
        self.weights: dict[tuple[int, int], tuple[nn.Parameter, Any]] = {}

    def linear(self, layer: ModulatedLinear) -> nn.Linear:
        new = self._projection(MergedLinear, layer.weight, layer.bilinear, layer.bias)
        self._finish(new, layer)
        return new

    def attention(self, layer: ContextAttention) -> MergedAttention:
        tensors = zip(*layer.projections(), strict=True)
        projections = [self._projection(nn.Linear, *t).train(layer.training) for t in tensors]
        out_proj = copy.deepcopy(layer.W_o, self.memo)
        new = MergedAttention(
            projections,
            layer.n_heads,
            layer.n_kv_heads,
            out_proj,
            is_causal=layer.is_causal,
            dropout=layer.dropout,
        )
        self._finish(new, layer)
        return new

    def _finish(self, new: nn.Module, layer: nn.Module) -> None:
        new.training = layer.training
        for name, buffer in layer.named_buffers(recurse=False):
            new.register_buffer(name, copy.deepcopy(buffer, self.memo))

    def _projection(
        self,
        cls: type[nn.Linear],
        weight: torch.Tensor | None,
        bilinear: torch.Tensor | BilinearFactors | Int8Bilinear,
        bias: torch.Tensor | None,
    ) -> nn.Linear:
        key = (id(weight), id(bilinear))
        if key not in self.weights:
            made = merged_weight(weight, bilinear, self.context).mT.contiguous()
            needs_grad = any(p.requires_grad for p in _tensors(bilinear if weight is None else weight))
            self.weights[key] = nn.Parameter(made, requires_grad=needs_grad), (weight, bilinear)
        merged = self.weights[key][0]
        # nothing is allocated or drawn for parameters that are replaced
        d_out, d_in = merged.shape
        new = cls(d_in, d_out, bias=False, device="meta")
        new.weight = merged
        if bias is not None:
            new.bias = self._bias(bias, merged.dtype)
        return new

    def _bias(self, bias: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
        if isinstance(bias, nn.Parameter) and bias.dtype is dtype:
            return copy.deepcopy(bias, self.memo)
        return nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)


def _tensors(bilinear: torch.Tensor | nn.Module) -> list[torch.Tensor]:
    return [bilinear] if isinstance(bilinear, torch.Tensor) else list(bilinear.parameters())


@torch.no_grad()
def merged_weight(
    weight: torch.Tensor | None, bilinear: torch.Tensor | BilinearFactors | Int8Bilinear, context: torch.Tensor
) -> torch.Tensor:
    """weight + Σ_k bilinear[:, :, k] context[k], [D, E] in the dtype of weight; summed in float32 or wider."""
    if isinstance(bilinear, Int8Bilinear):
        return int8_weight(weight, bilinear, context).to(torch.float32 if weight is None else weight.dtype)
    if isinstance(bilinear, BilinearFactors):
        wide = torch.promote_types(bilinear.out_factor.dtype, torch.float32)
        in_factor, context_factor, out_factor = (t.to(wide) for t in bilinear.factors())
        total = (in_factor * (context.to(in_factor.device, wide) @ context_factor)) @ out_factor
        return total.to(bilinear.out_factor.dtype) if weight is None else (total + weight.to(wide)).to(weight.dtype)
    wide = torch.promote_types(bilinear.dtype, torch.float32)
    total = torch.zeros(bilinear.shape[:2], dtype=wide, device=bilinear.device)
    for row in range(bilinear.shape[0]):
        total[row] = bilinear[row].to(wide) @ context.to(bilinear.device, wide)
    return total.to(bilinear.dtype) if weight is None else (total + weight.to(wide)).to(weight.dtype)

"""Linear layers with what was attached to them; each stays the object that it was, with its weight, hooks and names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctxkern.functional import factored_modulated_linear, lora_linear, modulated_linear
from ctxkern.nn.factors import BilinearFactors
from ctxkern.nn.linear import sequences
from ctxkern.ops import distributed
from ctxkern.serve.cache import Base, kept
from ctxkern.serve.int8 import Int8Bilinear, int8_modulated_linear

from .using import Attached, Used


class AttachedLayer(nn.Module):
    """What both kinds share; the class after it in the order of resolution is that of the layer before."""

    attached: Attached
    weight: Tensor
    bias: Tensor | None

    @property
    def out_in(self) -> Tensor:
        """The weight as [E, D], a view."""
        return self.weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module has it, but what was added is sharded as the weight is: torch's ColwiseParallel shards every
        parameter of a linear layer in its first dimension, RowwiseParallel the weight alone.

        Raises:
            RuntimeError: a layer with `rank=`, whose factors are a module that those styles take for a linear layer.
        """
        if param is not None and distributed((param,)):
            if any(name.startswith(("weight", f"{added}.")) for added in self.attached.added if added in self._modules):
                raise RuntimeError(
                    f"layer {self.attached.name!r} is attached with rank=; parallelize_module must come before "
                    "attach_contexts, which shards the factors as the weight is"
                )
            if name in self.attached.added and distributed((self.weight,)):
                from . import placed

                param = nn.Parameter(placed.distributed(self, name, param.data), param.requires_grad)
        super().register_parameter(name, param)

    def used(self) -> Used:
        """What `use` set.

        Raises:
            RuntimeError: outside of `use`.
        """
        used = self.attached.slot.used
        if used is None:
            raise RuntimeError(
                f"layer {self.attached.name!r} is attached and nothing is in use; the model must be called within "
                "`with ctxkern.use(model, ...)`, with nothing more than the model to compute what it did before"
            )
        return used


class ContextLayer(AttachedLayer):
    """y_b = x_b (W + Σ_k bilinear[:, :, k] context[b, k]) + bias."""

    bilinear: Any  # nn.Parameter [D, E, K], BilinearFactors or Int8Bilinear
    bilinear_names = ("bilinear",)
    weight_cache: Any = None

    def base_of(self, name: str) -> Base:
        """The shared weight of the bilinear tensor of that name."""
        return Base(self.weight, self.out_in.mT)

    def forward(self, x: Tensor) -> Tensor:
        used = self.used()
        if used.context is None:
            return super().forward(x)
        context, index = used.context, used.context_index
        if self.weight_cache is not None:
            bounds = used.cu_seqlens
            y = kept(self, "bilinear", _rows(x, bounds), context, index, self.bias, cu_seqlens=bounds, repeats=True)
            if y is not None:
                return y.view(*x.shape[:-1], y.shape[-1])
        if context.dim() == 3:
            context, index = _expanded(context, x), None
        elif used.cu_seqlens is None:
            index = _expanded_index(index, context.shape[0], x)
        rows = _rows(x, used.cu_seqlens)
        spans = {"context_index": index, "cu_seqlens": used.cu_seqlens}
        weight = self.out_in.mT
        if isinstance(self.bilinear, BilinearFactors):
            factors = self.bilinear.factors()
            if distributed(factors) and not distributed((x, weight)):
                # transformers computes with local tensors where no gradient is needed, of the layer's own parameters
                factors = tuple(t.to_local() for t in factors)
            y = factored_modulated_linear(rows, context, weight, *factors, self.bias, **spans)
        elif isinstance(self.bilinear, Int8Bilinear):
            y = int8_modulated_linear(rows, context, weight, self.bilinear, self.bias, **spans)
        else:
            y = modulated_linear(rows, context, weight, self.bilinear, self.bias, **spans)
        return y.view(*x.shape[:-1], y.shape[-1])


class AdapterLayer(AttachedLayer):
    """y_b = x_b Wᵀ + scale_b (x_b A_bᵀ) B_bᵀ + bias."""

    lora_A: nn.Parameter  # [n, r, D]  # noqa: N815
    lora_B: nn.Parameter  # [n, E, r]  # noqa: N815
    lora_scale: Tensor  # [n] float32, whatever the model is cast to

    def _apply(self, fn: Any, *how: Any) -> Any:
        scale = self.lora_scale
        super()._apply(fn, *how)
        if not scale.is_meta:
            self.lora_scale = scale.to(self.lora_scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        used = self.used()
        if used.lora is not None:
            if self.attached.name not in used.lora:
                return super().forward(x)
            A, B = used.lora[self.attached.name]
            scale: Any = 1.0 if self.attached.alpha is None else self.attached.alpha / max(A.shape[1], 1)
        elif used.adapter_index is None:
            return super().forward(x)
        else:
            A, B, scale = self.lora_A, self.lora_B, self.lora_scale
        index = used.adapter_index
        if used.cu_seqlens is None:
            index = _expanded_index(index, A.shape[0], x)
        rows = _rows(x, used.cu_seqlens)
        spans: dict[str, Any] = {"adapter_index": index, "cu_seqlens": used.cu_seqlens}
        if used.seeds is not None:
            spans |= {"dropout": used.dropout, "seed": used.seeds[self.attached.name]}
        y = lora_linear(rows, self.out_in, A, B, scale, self.bias, **spans)
        return y.view(*x.shape[:-1], y.shape[-1])


class ContextLinear(ContextLayer, nn.Linear):
    """An nn.Linear with a weight for each context."""


class AdapterLinear(AdapterLayer, nn.Linear):
    """An nn.Linear with a bank of adapters."""


def class_for(plain: type[nn.Module], kind: type[AttachedLayer]) -> type[nn.Module]:
    """The class of a layer of the kind that was of the class `plain`, an nn.Linear or transformers' Conv1D."""
    if plain is nn.Linear:
        return ContextLinear if kind is ContextLayer else AdapterLinear
    from . import conv1d

    return conv1d.ContextConv1D if kind is ContextLayer else conv1d.AdapterConv1D


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x as the functions take it; packed sequences that a model has as one row of a batch as [N, D]."""
    return sequences(x, None) if cu_seqlens is None else x.flatten(0, -2)


def _expanded_index(index: Tensor | None, rows: int, x: Tensor) -> Tensor | None:
    """The index of a batch that may have been expanded: one row of it for as many of x, next to each other."""
    given = rows if index is None else index.shape[0]
    if given in (0, x.shape[0]) or x.shape[0] % given:
        return index
    index = torch.arange(rows, device=x.device) if index is None else index
    return index.repeat_interleave(x.shape[0] // given)


def _expanded(context: Tensor, x: Tensor) -> Tensor:
    """Contexts per token, likewise."""
    given = context.shape[0]
    if given in (0, x.shape[0]) or x.shape[0] % given:
        return context
    return context.repeat_interleave(x.shape[0] // given, 0)

"""Attention whose Q, K and V weights depend on a context, as einsums and fused. Both have the same state_dict."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ctxkern import reference
from ctxkern.functional import factored_modulated_linear, modulated_qkv
from ctxkern.serve.cache import Base, kept
from ctxkern.serve.int8 import Int8Bilinear, int8_modulated_linear

from .attend import attend, check_dtype
from .cache import KVCache
from .factors import BilinearFactors, bilinear_parameter
from .init import init_bilinear_

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ContextAttention(nn.Module):
    """What the fused layer and the einsum layer share: all but how q, k and v are computed (`qkv`)."""

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_heads: int = 1,
        *,
        n_kv_heads: int | None = None,
        bias: bool = False,
        out_proj: bool = True,
        out_bias: bool | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        rank: int | None = None,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{op}: {name} is {value!r}; it must be a positive integer")
        if not _is_integer(context_dim) or context_dim < 0:
            raise ValueError(f"{op}: context_dim is {context_dim!r}; it must be an integer of at least 0")
        if d_model % n_heads:
            raise ValueError(f"{op}: n_heads is {n_heads}; it must divide d_model = {d_model}")
        if n_heads % n_kv_heads:
            raise ValueError(f"{op}: n_kv_heads is {n_kv_heads}; it must divide n_heads = {n_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{op}: dropout is {dropout!r}; it must be at least 0 and less than 1")
        self.d_model = d_model
        self.context_dim = context_dim
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.is_causal = is_causal
        self.dropout = dropout
        self.init = init
        kv_dim = n_kv_heads * (d_model // n_heads)
        self.W_q_base = _Base(d_model, d_model, bias, device, dtype)
        self.W_k_base = _Base(d_model, kv_dim, bias, device, dtype)
        self.W_v_base = _Base(d_model, kv_dim, bias, device, dtype)
        self.rank = rank
        self.bilinear_q = bilinear_parameter(d_model, d_model, context_dim, rank, init, device, dtype)
        self.bilinear_k = bilinear_parameter(d_model, kv_dim, context_dim, rank, init, device, dtype)
        self.bilinear_v = bilinear_parameter(d_model, kv_dim, context_dim, rank, init, device, dtype)
        out_bias = bias if out_bias is None else out_bias
        self.W_o = nn.Linear(d_model, d_model, bias=out_bias, device=device, dtype=dtype) if out_proj else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as at construction."""
        for layer in (self.W_q_base, self.W_k_base, self.W_v_base, self.W_o):
            if layer is not None:
                layer.reset_parameters()
        for tensor in (self.bilinear_q, self.bilinear_k, self.bilinear_v):
            if isinstance(tensor, BilinearFactors):
                tensor.reset_parameters()
            else:
                init_bilinear_(tensor, self.init)

    def extra_repr(self) -> str:
        heads = f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"d_model={self.d_model}, context_dim={self.context_dim}{rank}, {heads}, is_causal={self.is_causal}"

    def projections(
        self,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | BilinearFactors], list[torch.Tensor | None]]:
        """(weights, bilinears, biases) of q, k and v."""
        bases = (self.W_q_base, self.W_k_base, self.W_v_base)
        return (
            [b.weight for b in bases],
            [self.bilinear_q, self.bilinear_k, self.bilinear_v],
            [b.bias for b in bases],
        )

    def qkv(self, x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None) -> QKV:
        """q [B, S, D], and k and v [B, S, n_kv_heads · head_dim], of x."""
        raise NotImplementedError(f"{type(self).__name__} must define qkv(x, context, context_index)")

    def _factored(
        self,
        fn: Callable[..., torch.Tensor],
        x: torch.Tensor,
        context: torch.Tensor,
        context_index: torch.Tensor | None,
        **options: Any,
    ) -> QKV:
        """q, k and v by a function of the factors."""
        q, k, v = (
            fn(x, context, weight, *factors.factors(), bias, context_index=context_index, **options)
            for weight, factors, bias in zip(*self.projections(), strict=True)
        )
        return q, k, v

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        *,
        context_index: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Attention of x under its contexts.

        Args:
            x: [B, S, D].
            context: [F, K], one row per sequence (F == B), one for all (F == 1), or rows picked by `context_index`; or
                [B, S, K], one per token.
            context_index: [B] int64, the row of `context` that each sequence uses.
            key_padding_mask: [B, T] bool, True at padding, as in nn.MultiheadAttention; T = S, or with a cache all
                tokens so far.
            attn_mask: bool (True where a query may attend) or float (added to scores), broadcast to [B, H, S, T].
            cache: a KVCache to which these tokens are appended; they attend to all its tokens.

        Returns:
            [B, S, D]. A query with nothing to attend to gives zeros before the output projection.

        Raises:
            TypeError, ValueError: a type, dtype or shape that does not fit; the message names the argument.
        """
        q, k, v = self.qkv(x, context, context_index)
        check_dtype(q, self.W_o, "W_o")
        y = attend(
            q,
            k,
            v,
            self.n_heads,
            self.n_kv_heads,
            is_causal=self.is_causal,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cache=cache,
        )
        return y if self.W_o is None else self.W_o(y)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral)


class _Base(nn.Module):
    """The shared part of a modulated projection: weight [D, E], used as x @ weight, and a bias."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[0] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, bias={self.bias is not None}"


class EinsumContextModulatedAttention(ContextAttention):
    """The layer as users first write it: the whole weight of every sequence, by einsum. The baseline of comparisons.

    Arguments, parameters and errors as in `ContextModulatedAttention`, so that a state_dict goes both ways; `swap`
    turns this layer into that one.

    Example:
        >>> layer = EinsumContextModulatedAttention(d_model=8, context_dim=4, n_heads=2)
        >>> layer(torch.randn(3, 5, 8), torch.randn(3, 4)).shape
        torch.Size([3, 5, 8])
    """

    def qkv(self, x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None) -> QKV:
        if x.dim() != 3:
            raise ValueError(f"attention: x has shape {list(x.shape)}; it must be [B, S, D]")
        if self.rank is not None:
            return self._factored(reference.factored_modulated_linear_ref, x, context, context_index)
        q, k, v = reference.modulated_qkv_ref(x, context, *self.projections(), context_index=context_index)
        return q, k, v


class ContextModulatedAttention(ContextAttention):
    """Multi-head attention with W_b = W_base + Σ_k bilinear[:, :, k] context[b, k] for q, k and v, never held whole.

    Args:
        d_model: D, width of x.
        context_dim: K, width of a context.
        n_heads: number of query heads; it must divide d_model.
        n_kv_heads: number of key and value heads (grouped-query attention); it must divide n_heads. None: n_heads.
        bias: whether to add W_q_base.bias and so on, which all contexts share.
        out_proj: whether there is an output projection `W_o`.
        out_bias: whether it has a bias. None: as `bias`.
        is_causal: whether later tokens are masked.
        dropout: probability of dropping an attention weight, in training only.
        rank: R, where bilinear tensors are kept by CP factors of that rank, as in `ModulatedLinear`; None: whole.
        init: how the bilinear tensors start, see `init_bilinear_` and `init_factors_`.
        device, dtype: of the parameters.

    Attributes:
        W_q_base.weight: [D, D], used as x @ weight; also W_k_base and W_v_base, [D, n_kv_heads · head_dim].
        bilinear_q: [D, D, K]; also bilinear_k and bilinear_v, [D, n_kv_heads · head_dim, K]; or a `BilinearFactors`
            each.
        W_o: nn.Linear, or None.
        workspace_bytes, backend: passed to `ctxkern.modulated_qkv`; None, the defaults, may be set on a layer.

    Raises:
        ValueError: a size or rank that is not positive, heads that do not divide, a dropout outside [0, 1), or an
            unknown init.

    Works under torch.compile(fullgraph=True), torch.export and AOTInductor. A process that loads an exported program or
    an AOTInductor package of it must `import ctxkern` first, which registers the operators.

    Example:
        >>> layer = ContextModulatedAttention(d_model=8, context_dim=4, n_heads=2, is_causal=True)
        >>> x, contexts = torch.randn(3, 5, 8), torch.randn(2, 4)
        >>> layer(x, contexts, context_index=torch.tensor([0, 1, 0])).shape
        torch.Size([3, 5, 8])
    """

    bilinear_names = ("bilinear_q", "bilinear_k", "bilinear_v")
    weight_cache: Any = None
    workspace_bytes: int | None = None
    backend: str | None = None

    def base_of(self, name: str) -> Base:
        """The shared weight of the bilinear tensor of that name."""
        weight = getattr(self, f"W_{name[-1]}_base").weight
        return Base(weight, weight)

    def qkv(self, x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None) -> QKV:
        if self.weight_cache is not None and self.backend is None:
            made = self._kept(x, context, context_index)
            if made is not None:
                return made
        x, context, context_index = _broadcast(x, context, context_index)
        if self.rank is not None:
            return self._factored(factored_modulated_linear, x, context, context_index, backend=self.backend)
        if isinstance(self.bilinear_q, Int8Bilinear):
            q, k, v = (
                int8_modulated_linear(x, context, weight, int8, bias, context_index=context_index, backend=self.backend)
                for weight, int8, bias in zip(*self.projections(), strict=True)
            )
            return q, k, v
        q, k, v = modulated_qkv(
            x,
            context,
            *self.projections(),
            context_index=context_index,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )
        return q, k, v

    def _kept(self, x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None) -> QKV | None:
        """q, k and v by kept weights, or None."""
        rows = context if context_index is None else context_index
        repeats = isinstance(rows, torch.Tensor) and len(rows) == 1
        made = []
        for name, bias in zip(self.bilinear_names, self.projections()[2], strict=True):
            y = kept(self, name, x, context, context_index, bias, repeats=repeats)
            if y is None:
                return None
            made.append(y)
        return made[0], made[1], made[2]


def _broadcast(
    x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments with sizes of 1 repeated, as the einsums repeat them; what does not fit stays, to be named."""
    given = (x, context) if context_index is None else (x, context, context_index)
    if not all(isinstance(t, torch.Tensor) for t in given) or x.dim() != 3:
        return x, context, context_index
    if context.dim() == 3:
        # x [B, S, D], context [B, S, K]
        if all(m == n or 1 in (m, n) for m, n in zip(x.shape[:2], context.shape[:2], strict=True)):
            sizes = torch.broadcast_shapes(x.shape[:2], context.shape[:2])
            return x.expand(*sizes, -1), context.expand(*sizes, -1), context_index
        return x, context, context_index
    batch, rows = x.shape[0], (context if context_index is None else context_index).shape[0]
    if rows == batch:
        return x, context, context_index
    if rows == 1:
        # one context for all sequences
        index = torch.zeros(1, dtype=torch.int64, device=x.device) if context_index is None else context_index
        return x, context, index.expand(batch)
    return (x.expand(rows, -1, -1) if batch == 1 else x), context, context_index

"""A transformer block around an attention layer, which a context may modulate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import ContextModulatedAttention
from .cache import KVCache

NORMS = ("pre", "post", "none")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class TransformerBlock(nn.Module):
    """Transformer block: attention, then an MLP, each with a residual connection and a norm.

    Pre-norm is x + f(norm(x)) and post-norm norm(x + f(x)), for f the attention and then the MLP. With `film`, what a
    norm gives is scaled by 1 + γ and shifted by β, where γ and β are linear in the context and zero at the start.

    Args:
        d_model: D, width of x.
        context_dim: K, width of a context.
        n_heads: number of heads; it must divide d_model.
        mlp_ratio: hidden width of the MLP divided by d_model; 0 for no MLP.
        dropout: on attention weights and on both residual branches, in training only.
        film: whether the context also scales and shifts what the norms give.
        norm: "pre", "post", or "none" for no norms.
        activation: of the MLP, "gelu" or "relu".
        residual: False leaves the residual connections out: f(norm(x)), or norm(f(x)).
        attention: the class of the attention layer, called as `ContextModulatedAttention` is.
        attention_kwargs: its further arguments, such as `is_causal` and `init`.

    Raises:
        ValueError: an unknown norm or activation, an mlp_ratio below 0, `film` without norms; as in
            `ContextModulatedAttention`.

    Source: Vaswani et al., Attention Is All You Need (2017), for the post-norm order; Xiong et al., On Layer
    Normalization in the Transformer Architecture (2020), for the pre-norm order; Perez et al., FiLM (2018), and Peebles
    and Xie, Scalable Diffusion Models with Transformers (2023), for `film`.

    Example:
        >>> block = TransformerBlock(8, 4, n_heads=2, is_causal=True)
        >>> block(torch.randn(3, 5, 8), torch.randn(3, 4)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_heads: int,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        film: bool = False,
        norm: str = "pre",
        activation: str = "gelu",
        residual: bool = True,
        attention: type[nn.Module] = ContextModulatedAttention,
        **attention_kwargs: Any,
    ) -> None:
        super().__init__()
        for name, value, known in (("norm", norm, NORMS), ("activation", activation, tuple(ACTIVATIONS))):
            if value not in known:
                raise ValueError(f"TransformerBlock: {name} is {value!r}; it must be one of {', '.join(known)}")
        if not mlp_ratio >= 0:
            raise ValueError(f"TransformerBlock: mlp_ratio is {mlp_ratio!r}; it must be at least 0")
        if film and norm == "none":
            raise ValueError("TransformerBlock: norm is 'none'; it must be 'pre' or 'post' with film")
        self.norm, self.residual = norm, residual
        hidden, normed = int(mlp_ratio * d_model), norm != "none"
        factory = {key: attention_kwargs[key] for key in ("device", "dtype") if key in attention_kwargs}
        self.attention_norm = nn.LayerNorm(d_model, **factory) if normed else None
        self.attention = attention(d_model, context_dim, n_heads, dropout=dropout, **attention_kwargs)
        self.mlp_norm = nn.LayerNorm(d_model, **factory) if normed and hidden else None
        self.mlp = None
        if hidden:
            self.mlp = nn.Sequential(
                nn.Linear(d_model, hidden, **factory), ACTIVATIONS[activation](), nn.Linear(hidden, d_model, **factory)
            )
        self.dropout = nn.Dropout(dropout)
        self.attention_film = _Film(context_dim, 2 * d_model, bias=False, **factory) if film else None
        self.mlp_film = _Film(context_dim, 2 * d_model, bias=False, **factory) if film and hidden else None

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None,
        *,
        context_index: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The block under its contexts: arguments and errors as in `ContextModulatedAttention.forward`.

        Returns:
            [B, S, D].
        """

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.attention(
                x, context, context_index=context_index, key_padding_mask=key_padding_mask, cache=cache
            )

        x = self._sublayer(x, attend, self.attention_norm, self.attention_film, context, context_index)
        if self.mlp is None:
            return x
        return self._sublayer(x, self.mlp, self.mlp_norm, self.mlp_film, context, context_index)

    def _sublayer(
        self,
        x: torch.Tensor,
        function: Callable[[torch.Tensor], torch.Tensor],
        norm: nn.Module | None,
        film: nn.Module | None,
        context: torch.Tensor | None,
        context_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [B, S, D] through a function, with residual connection and norm in their order."""

        def normed(x: torch.Tensor) -> torch.Tensor:
            return x if norm is None else _filmed(norm(x), film, context, context_index)

        y = self.dropout(function(normed(x) if self.norm == "pre" else x))
        y = x + y if self.residual else y
        return normed(y) if self.norm == "post" else y


class _Film(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _filmed(
    x: torch.Tensor, film: nn.Module | None, context: torch.Tensor | None, context_index: torch.Tensor | None
) -> torch.Tensor:
    """x [B, S, D] scaled and shifted by a map of its contexts."""
    if film is None:
        return x
    if context is None:
        raise TypeError("TransformerBlock: context is None; it must be a tensor where there is film")
    changes = film(context if context_index is None else context[context_index])
    # one context a sequence, or one a token
    scale, shift = (changes if context.dim() == 3 else changes[:, None]).chunk(2, -1)
    return x * (1 + scale) + shift

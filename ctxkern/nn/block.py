"""A transformer block around a context-modulated attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import ContextModulatedAttention
from .cache import KVCache


class TransformerBlock(nn.Module):
    """Pre-norm transformer block whose attention is modulated by a context.

    x = x + attention(norm(x), context), then x = x + mlp(norm(x)) with a GELU MLP. With `film`, what a norm gives is
    scaled by 1 + γ and shifted by β, where γ and β are linear in the context and zero at the start.

    Args:
        d_model: D, width of x.
        context_dim: K, width of a context.
        n_heads: number of heads; it must divide d_model.
        mlp_ratio: hidden width of the MLP divided by d_model.
        dropout: on attention weights and on both residual branches, in training only.
        film: whether the context also scales and shifts what the norms give.
        attention: the class of the attention layer, called as `ContextModulatedAttention` is.
        attention_kwargs: its further arguments, such as `is_causal` and `init`.

    Raises:
        ValueError: as in `ContextModulatedAttention`.

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture (2020), for the pre-norm order; Perez
    et al., FiLM (2018), and Peebles and Xie, Scalable Diffusion Models with Transformers (2023), for `film`.

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
        attention: type[nn.Module] = ContextModulatedAttention,
        **attention_kwargs: Any,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * d_model)
        factory = {key: attention_kwargs[key] for key in ("device", "dtype") if key in attention_kwargs}
        self.attention_norm = nn.LayerNorm(d_model, **factory)
        self.attention = attention(d_model, context_dim, n_heads, dropout=dropout, **attention_kwargs)
        self.mlp_norm = nn.LayerNorm(d_model, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, hidden, **factory), nn.GELU(), nn.Linear(hidden, d_model, **factory)
        )
        self.dropout = nn.Dropout(dropout)
        self.attention_film = _Film(context_dim, 2 * d_model, bias=False, **factory) if film else None
        self.mlp_film = _Film(context_dim, 2 * d_model, bias=False, **factory) if film else None

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        *,
        context_index: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The block under its contexts: arguments and errors as in `ContextModulatedAttention.forward`.

        Returns:
            [B, S, D].
        """
        attended = self.attention(
            _filmed(self.attention_norm(x), self.attention_film, context, context_index),
            context,
            context_index=context_index,
            key_padding_mask=key_padding_mask,
            cache=cache,
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(_filmed(self.mlp_norm(x), self.mlp_film, context, context_index)))


class _Film(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _filmed(
    x: torch.Tensor, film: nn.Module | None, context: torch.Tensor, context_index: torch.Tensor | None
) -> torch.Tensor:
    """x [B, S, D] scaled and shifted by a map of its contexts."""
    if film is None:
        return x
    changes = film(context if context_index is None else context[context_index])
    # one context a sequence, or one a token
    scale, shift = (changes if context.dim() == 3 else changes[:, None]).chunk(2, -1)
    return x * (1 + scale) + shift

"""The layers that `merge` leaves behind: plain torch, with the weights of one context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.checks import autocast_enabled

from .attend import attend, check_dtype
from .cache import KVCache


class MergedLinear(nn.Linear):
    """An nn.Linear that is called as ModulatedLinear is: its context arguments are optional and unused.

    Example:
        >>> layer = MergedLinear(8, 6)
        >>> layer(torch.randn(3, 5, 8), torch.randn(3, 4)).shape
        torch.Size([3, 5, 6])
    """

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        context_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., D] → [..., E], in the dtype of x as ModulatedLinear has it."""
        if self.weight.dtype is x.dtype or autocast_enabled(x):
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class MergedAttention(nn.Module):
    """Attention that is called as ContextModulatedAttention is: its context arguments are optional and unused.

    Args:
        projections: the three nn.Linear of q, k and v.
        n_heads, n_kv_heads, is_causal, dropout: as in `ContextModulatedAttention`.
        out_proj: the output projection, or None.

    Example:
        >>> layer = MergedAttention([nn.Linear(8, 8) for _ in range(3)], 2, 2, None, is_causal=True, dropout=0.0)
        >>> layer(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        projections: list[nn.Linear],
        n_heads: int,
        n_kv_heads: int,
        out_proj: nn.Module | None,
        *,
        is_causal: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = projections
        self.W_o = out_proj
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.is_causal = is_causal
        self.dropout = dropout

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        context_index: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """As `ContextModulatedAttention.forward`; context and context_index are unused."""
        check_dtype(x, self.q, "q")
        y = attend(
            self.q(x),
            self.k(x),
            self.v(x),
            self.n_heads,
            self.n_kv_heads,
            is_causal=self.is_causal,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cache=cache,
        )
        return y if self.W_o is None else self.W_o(y)

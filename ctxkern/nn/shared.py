"""`SharedAttention`: attention that no context modulates, with the names of the layers that one does."""

from __future__ import annotations

from typing import Any

import torch

from .attention import QKV, ContextAttention


class SharedAttention(ContextAttention):
    """Attention whose weights are those of all contexts: the context is not used and may be None.

    Arguments, parameters and errors as in `ContextModulatedAttention`, without the bilinear tensors; `rank` and `init`,
    which are theirs, are of no effect.

    Example:
        >>> layer = SharedAttention(d_model=8, context_dim=0, n_heads=2, is_causal=True)
        >>> layer(torch.randn(3, 5, 8), None).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_heads: int = 1,
        *,
        rank: int | None = None,
        init: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, 0, n_heads, **kwargs)
        self.context_dim = context_dim
        for name in ("bilinear_q", "bilinear_k", "bilinear_v"):
            delattr(self, name)

    def reset_parameters(self) -> None:
        for layer in (self.W_q_base, self.W_k_base, self.W_v_base, self.W_o):
            if layer is not None:
                layer.reset_parameters()

    def qkv(self, x: torch.Tensor, context: torch.Tensor | None, context_index: torch.Tensor | None) -> QKV:
        bases = (self.W_q_base, self.W_k_base, self.W_v_base)
        q, k, v = (x @ base.weight if base.bias is None else x @ base.weight + base.bias for base in bases)
        return q, k, v

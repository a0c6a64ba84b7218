import torch
from torch import nn

from ctxkern.nn.attention import ContextModulatedAttention


class TransformerBlock(nn.Module):
    """Pre-norm transformer block whose attention is modulated by a context.

    ``x = x + attention(norm(x), context)``, then ``x = x + mlp(norm(x))`` with a GELU MLP of ``mlp_ratio * d_model``.

    Args:
        d_model: D, the width.
        context_dim: K.
        n_heads: a divisor of ``d_model``.
        mlp_ratio: hidden width of the MLP over ``d_model``.
        dropout: on attention weights and on both residual branches, in training.
        attention: the attention layer's class, called as :class:`ctxkern.nn.ContextModulatedAttention` is.
        attention_kwargs: handed to it, such as ``is_causal`` and ``init``.

    Source: the pre-norm order of Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020.
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_heads: int,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        attention: type[nn.Module] = ContextModulatedAttention,
        **attention_kwargs,
    ):
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

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        *,
        context_index: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cache=None,
    ) -> torch.Tensor:
        """``x`` [B, S, D]; ``context`` [F, K] with ``context_index`` [B], or [B, K], or [B, S, K]; ``key_padding_mask``
        [B, S] bool, True at padding; ``cache`` a :class:`ctxkern.nn.KVCache`. Returns [B, S, D]."""
        attended = self.attention(
            self.attention_norm(x),
            context,
            context_index=context_index,
            key_padding_mask=key_padding_mask,
            cache=cache,
        )
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

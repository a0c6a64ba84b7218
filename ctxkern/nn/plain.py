"""What needs torch alone: attention over projected q, k and v, and the layers that `merge` leaves behind."""

import torch
import torch.nn.functional as F
from torch import nn


class KVCache:
    """Keys and values of the tokens so far, [B, H, T, head_dim] each; one per attention layer."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self):
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k, v):
        """Adds new tokens and returns all keys and values."""
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return self.k, self.v


def attend(q, k, v, head_dim, *, is_causal=False, dropout=0.0, key_padding_mask=None, attn_mask=None, cache=None):
    """Multi-head attention of projected q [B, S, H·head_dim] over k and v [B, S, G·head_dim], G dividing H.

    Returns [B, S, H·head_dim].
    Masks as in `ContextModulatedAttention.forward`. Raises TypeError or ValueError where a mask does not fit.
    """
    q, k, v = (t.unflatten(2, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    past = 0 if cache is None else len(cache)
    total = past + k.shape[2]
    causal = is_causal and q.shape[2] > 1
    mask = attn_mask
    if mask is not None:
        _check_mask(mask, q, total)
    if key_padding_mask is not None:
        mask = _both(mask, _allowed(key_padding_mask, q.shape[0], total))
    if causal and (past or mask is not None):
        ones = torch.ones(q.shape[2], total, dtype=torch.bool, device=q.device)
        mask, causal = _both(mask, ones.tril(past)), False
    if cache is not None:
        k, v = cache.append(k, v)
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=gqa)
    return y.transpose(1, 2).flatten(2)


def _allowed(key_padding_mask, batch, total):
    """[B, 1, 1, T] bool, True where a key may be attended to."""
    if not isinstance(key_padding_mask, torch.Tensor) or key_padding_mask.dtype is not torch.bool:
        got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(f"attention: key_padding_mask is {got}, takes a bool tensor [B, T], True at padding")
    if key_padding_mask.shape != (batch, total):
        shape = list(key_padding_mask.shape)
        raise ValueError(f"attention: key_padding_mask has shape {shape}, takes [B, T] = {[batch, total]}")
    return ~key_padding_mask[:, None, None, :]


def _check_mask(mask, q, total):
    takes = "takes a bool tensor, or one added to scores, that broadcasts to [B, H, S, T]"
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention: attn_mask is {type(mask).__name__}, {takes}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"attention: attn_mask is {mask.dtype}, {takes}")
    full = (*q.shape[:3], total)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attention: attn_mask has shape {list(mask.shape)}, {takes} = {list(full)}")


def _both(mask, allowed):
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype is torch.bool else mask.masked_fill(~allowed, float("-inf"))


class MergedLinear(nn.Module):
    """y = x @ weight + bias with the weight [D, E] of one context; further arguments are taken and unused."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def forward(self, x, context=None, *, context_index=None, cu_seqlens=None):
        """x [..., D] → [..., E]."""
        return F.linear(x, self.weight.mT, self.bias)


class MergedAttention(nn.Module):
    """Attention with the weights of one context: `projections` are (weight [D, E], bias or None) of q, k and v."""

    def __init__(self, projections, n_heads, out_proj, is_causal, dropout):
        super().__init__()
        self.q, self.k, self.v = (MergedLinear(*p) for p in projections)
        self.W_o = out_proj
        self.head_dim = projections[0][0].shape[1] // n_heads
        self.is_causal, self.dropout = is_causal, dropout

    def forward(self, x, context=None, *, context_index=None, key_padding_mask=None, attn_mask=None, cache=None):
        """As ContextModulatedAttention.forward; context and context_index are unused."""
        y = attend(
            self.q(x),
            self.k(x),
            self.v(x),
            self.head_dim,
            is_causal=self.is_causal,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cache=cache,
        )
        return y if self.W_o is None else self.W_o(y)

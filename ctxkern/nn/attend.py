"""`attend`: attention over projected queries, keys and values, with masks and a cache. Needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.checks import autocast_enabled
from ctxkern.dtypes import name_of

from .cache import KVCache


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n_heads: int,
    n_kv_heads: int,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    cache: KVCache | None = None,
) -> torch.Tensor:
    """Multi-head attention of q [B, S, H·head_dim] over k and v [B, S, G·head_dim] with H = n_heads, G = n_kv_heads.

    Masks and cache as in `ContextModulatedAttention.forward`. Returns [B, S, H·head_dim]. Raises TypeError or
    ValueError where a mask does not fit, before the cache changes.
    """
    # [B, heads, S, head_dim]
    q = q.unflatten(2, (n_heads, -1)).transpose(1, 2)
    k, v = (t.unflatten(2, (n_kv_heads, -1)).transpose(1, 2) for t in (k, v))
    past = 0 if cache is None else len(cache)
    total = past + k.shape[2]
    mask = attn_mask
    if mask is not None:
        _check_mask(mask, q, total)
    if key_padding_mask is not None:
        mask = _both(mask, _allowed(key_padding_mask, q.shape[0], total))
    # only Python's own bools reach torch: compilers and tracers give sizes, and what is compared with them, other types
    causal = bool(is_causal)
    if causal and (past or mask is not None):
        causal = False
        # one token after others may attend to all of them
        if not past or q.shape[2] > 1:
            ones = torch.ones(q.shape[2], total, dtype=torch.bool, device=q.device)
            mask = _both(mask, ones.tril(past))
    if cache is not None:
        k, v = cache.append(k, v)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=n_heads != n_kv_heads)
    return y.transpose(1, 2).flatten(2)


def check_dtype(x: torch.Tensor, linear: nn.Module | None, name: str) -> None:
    """Raises TypeError, naming x, where a plain nn.Linear could not take it for its dtype."""
    if type(linear) is nn.Linear and linear.weight.dtype is not x.dtype and not autocast_enabled(x):
        got, takes = (name_of(t.dtype) for t in (x, linear.weight))
        raise TypeError(f"attention: x is {got}; it must be {takes} like {name}.weight, unless autocast is on")


def _allowed(key_padding_mask: torch.Tensor, batch: int, total: int) -> torch.Tensor:
    """[B, 1, 1, T] bool, True where a key may be attended to."""
    if not isinstance(key_padding_mask, torch.Tensor) or key_padding_mask.dtype is not torch.bool:
        got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(f"attention: key_padding_mask is {got}; it must be a bool tensor [B, T], True at padding")
    if key_padding_mask.shape != (batch, total):
        shape = list(key_padding_mask.shape)
        raise ValueError(f"attention: key_padding_mask has shape {shape}; it must be [B, T] = {[batch, total]}")
    return ~key_padding_mask[:, None, None, :]


def _check_mask(mask: torch.Tensor, q: torch.Tensor, total: int) -> None:
    takes = "it must be a bool tensor, or one added to scores, that broadcasts to [B, H, S, T]"
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention: attn_mask is {type(mask).__name__}; {takes}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"attention: attn_mask is {mask.dtype}; {takes}")
    full = (*q.shape[:3], total)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attention: attn_mask has shape {list(mask.shape)}; {takes} = {list(full)}")


def _both(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype is torch.bool else mask.masked_fill(~allowed, float("-inf"))

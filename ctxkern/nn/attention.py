"""Attention whose Q, K and V weights depend on a context, as einsums and fused. Both have one state_dict."""

import torch
from torch import nn

from ctxkern import reference
from ctxkern.functional import modulated_qkv

from .init import init_bilinear_
from .plain import attend


class _ContextAttention(nn.Module):
    """Multi-head attention with W_b = W_base + Σ_k bilinear[:, :, k] context[b, k] for q, k and v.

    Args:
        d_model: D, width of x. context_dim: K, width of a context.
        n_heads: query heads, dividing d_model. n_kv_heads: key and value heads, dividing n_heads (grouped-query
            attention); None: n_heads.
        bias: adds W_q_base.bias and so on, shared by all contexts. out_proj: an output projection `W_o`.
        is_causal: masks later tokens. dropout: of attention weights, in training only.
        init: how the bilinear tensors start, see `ctxkern.nn.init_bilinear_`.

    Parameters: W_q_base.weight [D, D] and bilinear_q [D, D, K], and so for k and v (second dimension n_kv_heads ·
    head_dim), W_o.weight [D, D]. Weights are used as y = x @ weight, as the einsum form has it.

    Raises ValueError where the sizes do not divide or are not positive.
    """

    def __init__(
        self,
        d_model,
        context_dim,
        n_heads=1,
        *,
        n_kv_heads=None,
        bias=False,
        out_proj=True,
        is_causal=False,
        dropout=0.0,
        init="normal",
        device=None,
        dtype=None,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, takes a positive integer")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ValueError(f"context_dim is {context_dim!r}, takes an integer of at least 0")
        if d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}, takes a divisor of d_model = {d_model}")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads is {n_kv_heads}, takes a divisor of n_heads = {n_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}, takes a number from 0 up to 1")
        self.d_model, self.context_dim, self.n_heads, self.n_kv_heads = d_model, context_dim, n_heads, n_kv_heads
        self.is_causal, self.dropout, self.init = is_causal, dropout, init
        kv_dim = n_kv_heads * (d_model // n_heads)
        factory = {"device": device, "dtype": dtype}
        self.W_q_base = _Base(d_model, d_model, bias, **factory)
        self.W_k_base = _Base(d_model, kv_dim, bias, **factory)
        self.W_v_base = _Base(d_model, kv_dim, bias, **factory)
        self.bilinear_q = nn.Parameter(torch.empty(d_model, d_model, context_dim, **factory))
        self.bilinear_k = nn.Parameter(torch.empty(d_model, kv_dim, context_dim, **factory))
        self.bilinear_v = nn.Parameter(torch.empty(d_model, kv_dim, context_dim, **factory))
        self.W_o = nn.Linear(d_model, d_model, bias=bias, **factory) if out_proj else None
        self.reset_parameters()

    def reset_parameters(self):
        for layer in (self.W_q_base, self.W_k_base, self.W_v_base, self.W_o):
            if layer is not None:
                layer.reset_parameters()
        for tensor in (self.bilinear_q, self.bilinear_k, self.bilinear_v):
            init_bilinear_(tensor, self.init)

    def extra_repr(self):
        heads = f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
        return f"d_model={self.d_model}, context_dim={self.context_dim}, {heads}, is_causal={self.is_causal}"

    def projections(self):
        """(weights, bilinears, biases) of q, k and v."""
        bases = (self.W_q_base, self.W_k_base, self.W_v_base)
        return (
            [b.weight for b in bases],
            [self.bilinear_q, self.bilinear_k, self.bilinear_v],
            [b.bias for b in bases],
        )

    def forward(self, x, context, *, context_index=None, key_padding_mask=None, attn_mask=None, cache=None):
        """Attention of x under its contexts.

        Args:
            x: [B, S, D]. context: [F, K] (F == B, or context_index [B] picks its rows), or [B, S, K], one a token.
            key_padding_mask: [B, T] bool, True at padding, as in nn.MultiheadAttention; T = S, or with a cache all
                tokens so far.
            attn_mask: bool (True where a query may attend) or float (added to scores), broadcast to [B, H, S, T].
            cache: a KVCache, to which these tokens are added and over all of which they attend.

        Returns:
            [B, S, D]. A query with nothing to attend to gives zeros before the output projection.

        Raises TypeError or ValueError where a shape or dtype does not fit, naming the argument.
        """
        y = attend(
            *self.qkv(x, context, context_index),
            self.d_model // self.n_heads,
            is_causal=self.is_causal,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cache=cache,
        )
        return y if self.W_o is None else self.W_o(y)


class _Base(nn.Module):
    """The shared part of a modulated projection: weight [D, E], used as x @ weight, and a bias."""

    def __init__(self, d_in, d_out, bias, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[0] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self):
        return f"{list(self.weight.shape)}, bias={self.bias is not None}"


class EinsumContextModulatedAttention(_ContextAttention):
    __doc__ = (
        "The layer as users first write it: a weight a sequence, whole, by einsum. The baseline of comparisons.\n\n"
        + _ContextAttention.__doc__
    )

    def qkv(self, x, context, context_index):
        return reference.modulated_qkv_ref(x, context, *self.projections(), context_index=context_index)


class ContextModulatedAttention(_ContextAttention):
    __doc__ = "The fused layer: no weight of a context is ever held.\n\n" + _ContextAttention.__doc__

    workspace_bytes = None
    backend = None

    def qkv(self, x, context, context_index):
        return modulated_qkv(
            x,
            context,
            *self.projections(),
            context_index=context_index,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

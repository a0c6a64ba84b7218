"""A context-modulated layer as a user wrote it, completed by the attention that its text leaves open."""

import torch
from torch import nn

import ctxkern
from ctxkern.nn import ContextModulatedAttention


class UserAttention(nn.Module):
    """Single-head attention with three einsum pairs; the weights of nn.Linear are used as they lie, x @ weight."""

    def __init__(self, d_model, context_dim):
        super().__init__()
        self.W_q_base = nn.Linear(d_model, d_model, bias=False)
        self.W_k_base = nn.Linear(d_model, d_model, bias=False)
        self.W_v_base = nn.Linear(d_model, d_model, bias=False)

        self.bilinear_q = nn.Parameter(torch.randn(d_model, d_model, context_dim))
        self.bilinear_k = nn.Parameter(torch.randn(d_model, d_model, context_dim))
        self.bilinear_v = nn.Parameter(torch.randn(d_model, d_model, context_dim))

    def forward(self, x, file_context):
        # x: [batch_size, seq_len, d_model]
        # file_context: [batch_size, context_dim]
        Wq = self.W_q_base.weight + torch.einsum("ijk,bk->bij", self.bilinear_q, file_context)
        Wk = self.W_k_base.weight + torch.einsum("ijk,bk->bij", self.bilinear_k, file_context)
        Wv = self.W_v_base.weight + torch.einsum("ijk,bk->bij", self.bilinear_v, file_context)

        Q = torch.einsum("bsd,bde->bse", x, Wq)
        K = torch.einsum("bsd,bde->bse", x, Wk)
        V = torch.einsum("bsd,bde->bse", x, Wv)
        return self.attend(Q, K, V)

    def attend(self, Q, K, V):
        scores = torch.einsum("bse,bte->bst", Q, K) / Q.shape[-1] ** 0.5
        return torch.einsum("bst,bte->bse", scores.softmax(-1), V)


class UserAttentionByCall(UserAttention):
    """The same with the three einsum pairs replaced by one call."""

    def forward(self, x, file_context):
        Q, K, V = ctxkern.modulated_qkv(
            x,
            file_context,
            [self.W_q_base.weight, self.W_k_base.weight, self.W_v_base.weight],
            [self.bilinear_q, self.bilinear_k, self.bilinear_v],
        )
        return self.attend(Q, K, V)


def fused(layer):
    """The ContextModulatedAttention that a UserAttention stands for, with the same parameters."""
    new = ContextModulatedAttention(*layer.bilinear_q.shape[1:], out_proj=False)
    for name in ("q", "k", "v"):
        getattr(new, f"W_{name}_base").weight = getattr(layer, f"W_{name}_base").weight
        setattr(new, f"bilinear_{name}", getattr(layer, f"bilinear_{name}"))
    return new

"""A model whose layers are merged, and inputs for it."""

import torch
from torch import nn

from ctxkern.nn import ContextModulatedAttention, ModulatedLinear

B, S, D, K = 3, 5, 8, 4


class Model(nn.Module):
    """Attention and a modulated head under one context."""

    def __init__(self, attention=ContextModulatedAttention, rank=None):
        super().__init__()
        self.attention = attention(D, K, 4, n_kv_heads=2, bias=True, rank=rank, init="hyperfan")
        self.norm = nn.LayerNorm(D)
        self.head = ModulatedLinear(D, 6, K, rank=rank, init="hyperfan")

    def forward(self, x, context):
        return self.head(self.norm(self.attention(x, context)), context)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, S, D, generator=generator).to(dtype), torch.randn(K, generator=generator).to(dtype)


def new_model():
    torch.manual_seed(0)
    return Model()

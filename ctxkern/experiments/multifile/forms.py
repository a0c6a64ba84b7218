"""Ways in which a file's context enters a model. In each, a file owns one row of the table of contexts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import ctxkern
from ctxkern.nn.attention import QKV, ContextModulatedAttention, EinsumContextModulatedAttention
from ctxkern.nn.shared import SharedAttention

ATTENTION = {"fused": ContextModulatedAttention, "einsum": EinsumContextModulatedAttention}
FORMS = {
    "bilinear": "weights of attention, by bilinear tensors",
    "none": "not at all: one model for all files",
    "token": "a learned token in front of each sequence",
    "added": "a learned vector added to every token's embedding",
    "film": "scale and shift of what the norms give",
    "lora": "low-rank weights of attention for each file",
    "bilinear+film": "bilinear and film",
}
BILINEAR, FILM, NORMED = ("bilinear", "bilinear+film"), ("film", "bilinear+film"), ("bilinear", "film", "bilinear+film")
# of q, k and v
_PROJECTIONS = 3


def context_width(form: str, *, context_dim: int, d_model: int, n_layers: int, lora_rank: int) -> int:
    """The entries of a file's row: K where it is mapped to what it changes, D where it is an embedding, the factors of
    all layers where it is a set of adapters, 0 for none."""
    if form in NORMED:
        return context_dim
    if form == "lora":
        return n_layers * _PROJECTIONS * lora_rank * 2 * d_model
    return 0 if form == "none" else d_model


@torch.no_grad()
def draw_contexts_(table: torch.Tensor, form: str, *, std: float, d_model: int, lora_rank: int) -> None:
    """Fill a table [F, context_width] as it is at step 0.

    N(0, 1) where a norm is set afterwards, N(0, std²) for embeddings; of adapters A is N(0, 1/D) and B zero, so that
    all files begin as the model without them.
    """
    if form in NORMED:
        table.normal_()
    elif form == "lora":
        table.zero_()
        for A, _ in adapters(table, d_model, lora_rank):
            A.normal_(std=d_model**-0.5)
    else:
        table.normal_(std=std)


def adapters(table: torch.Tensor, d_model: int, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(A [F, r, D], B [F, D, r]) of every projection in rows [F, ...] of adapters; views."""
    for part in table.split(2 * rank * d_model, 1):
        A, B = part.split(rank * d_model, 1)
        yield A.unflatten(1, (rank, d_model)), B.unflatten(1, (d_model, rank))


class LoraAttention(SharedAttention):
    """Attention with low-rank weights for each file: the context [F, 6·r·D] is A and B of q, k and v."""

    def __init__(self, d_model: int, context_dim: int, n_heads: int = 1, **kwargs: Any):
        super().__init__(d_model, context_dim, n_heads, **kwargs)
        self.adapter_rank = context_dim // (2 * _PROJECTIONS * d_model)

    def qkv(self, x: torch.Tensor, context: torch.Tensor, context_index: torch.Tensor | None) -> QKV:
        weights = (self.W_q_base.weight, self.W_k_base.weight, self.W_v_base.weight)
        q, k, v = (
            ctxkern.lora_linear(x, weight.mT, A, B, adapter_index=context_index)
            for weight, (A, B) in zip(weights, adapters(context, self.d_model, self.adapter_rank), strict=True)
        )
        return q, k, v


def attention_class(form: str, attention: str) -> type[nn.Module]:
    """The attention layer of a form."""
    if form in BILINEAR:
        return ATTENTION[attention]
    return LoraAttention if form == "lora" else SharedAttention

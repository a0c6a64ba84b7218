"""The specification: each family as the fewest lines of plain PyTorch, any dtype, differentiable any number of times.

Symbols: B sequences of S tokens, N tokens in all, D = d_in, E = d_out, K = context_dim, F rows in the context table.
Parameters may be wider or narrower than `x` (float32 next to bfloat16): the weight of a context is made in the widest
dtype and rounded once to that of `x`. Sources: per-context bilinear weights, Ha et al., HyperNetworks (2016), Jayakumar
et al., Multiplicative Interactions (2020); LoRA, Hu et al. (2021); CP factors, Kolda and Bader (2009).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_linear_ref(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    bilinear: Tensor,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y_b = x_b W_b + bias with W_b = weight + sum_k bilinear[:, :, k] context[b, k].

    Shapes: x [B, S, D], or packed [N, D] with cu_seqlens [B + 1]; context [F, K] (context_index [B] picks its rows) or
    [B, S, K], one per token; weight [D, E] or None; bilinear [D, E, K]; bias [E] or None. Returns [B, S, E] or [N, E]
    in the dtype of x. Builds W_b whole: B·D·E elements.
    """
    wide = torch.promote_types(torch.promote_types(bilinear.dtype, context.dtype), x.dtype)
    if context.dim() == 3:
        y = torch.einsum("bsd,dek,bsk->bse", x.to(wide), bilinear.to(wide), context.to(wide)).to(x.dtype)
        y = y if weight is None else y + x @ weight.to(x.dtype)
    else:
        context = context if context_index is None else context[context_index]
        weights = torch.einsum("dek,bk->bde", bilinear.to(wide), context.to(wide))
        weights = (weights if weight is None else weights + weight).to(x.dtype)
        y = _per_sequence(torch.matmul, x, cu_seqlens, weights)
    return y if bias is None else y + bias.to(x.dtype)


def modulated_qkv_ref(
    x: Tensor,
    context: Tensor,
    weights: Sequence[Tensor | None] | None,
    bilinears: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Three `modulated_linear_ref` of one x; `weights`, `bilinears`, `biases` hold one entry each for q, k and v."""
    weights, biases = weights or [None] * 3, biases or [None] * 3
    return tuple(
        modulated_linear_ref(x, context, w, t, b, context_index=context_index, cu_seqlens=cu_seqlens)
        for w, t, b in zip(weights, bilinears, biases, strict=True)
    )


def lora_linear_ref(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y_b = x_b weight^T + scale_b (dropout(x_b) A_b^T) B_b^T + bias, the layout of nn.Linear and PEFT.

    Shapes: x [B, S, D] or packed [N, D] with cu_seqlens [B + 1]; weight [E, D] or None; A [b, r, D]; B [b, E, r];
    scale a number or [b]; adapter_index [B] picks rows of A and B, −1 none; ranks [b]: only the first ranks[i] rows of
    A[i] and columns of B[i] count; seed: of `lora_dropout_mask`. Returns [B, S, E] or [N, E] in the dtype of x.
    """
    if ranks is not None:
        there = torch.arange(A.shape[1], device=A.device) < ranks[:, None]
        A, B = A.where(there[:, :, None], 0), B.where(there[:, None], 0)
    scale = scale.to(x.dtype)[:, None, None] if isinstance(scale, Tensor) else x.new_full((1, 1, 1), scale)
    scale = scale.expand(A.shape[0], 1, 1)
    A, B = A.to(x.dtype), B.to(x.dtype)
    if adapter_index is not None:
        # −1 is the last one, of zeros
        A, B, scale = (torch.cat([t, t.new_zeros(1, *t.shape[1:])])[adapter_index] for t in (A, B, scale))
    seen = x
    if dropout:
        mask = lora_dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout).to(x.device)
        seen = x.where(mask.view(x.shape), 0) / (1 - dropout)
    y = _per_sequence(
        lambda x, a, b, s: (s if x.dim() > 2 else s[0]) * ((x @ a.mT) @ b.mT), seen, cu_seqlens, A, B, scale
    )
    y = y if weight is None else y + F.linear(x, weight.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


def lora_dropout_mask(seed: int | Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """[rows, columns] bool: what `dropout` keeps of x, whose rows are counted from 0 to N - 1.

    A row has 64 bits of key, splitmix64 of its number and the seed; a column's draw of 32 bits is a murmur3 finaliser
    over the column and both halves of the key, and is kept from dropout·2^32 on.
    """
    device = seed.device if isinstance(seed, Tensor) else None
    low = 0xFFFFFFFF
    seed = torch.as_tensor(seed, dtype=torch.int64)
    key = _mixed_bits(torch.arange(rows, device=device) + _mixed_bits(seed))[:, None]
    column = torch.arange(columns, device=device)
    draw = (column * 0x9E3779B1 + (key & low)) & low
    draw = (((draw ^ draw >> 16) * 0x85EBCA6B) & low) ^ (key >> 32 & low)
    draw = ((draw ^ draw >> 13) * 0xC2B2AE35) & low
    return (draw ^ draw >> 16) >= round(dropout * 2**32)


def _mixed_bits(z):
    """The finaliser of splitmix64, of int64 whose bits count as unsigned."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ (z >> 31 & (1 << 33) - 1)


def factored_modulated_linear_ref(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    in_factor: Tensor,
    context_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y = x weight + ((x in_factor) ∘ (c context_factor)) out_factor + bias: `modulated_linear` with the CP-factored
    bilinear[d, e, k] = sum_r in_factor[d, r] out_factor[r, e] context_factor[k, r].

    Shapes: in_factor [D, R], context_factor [K, R], out_factor [R, E]; the rest as `modulated_linear_ref`.
    """
    wide = torch.promote_types(torch.promote_types(context_factor.dtype, context.dtype), x.dtype)
    gate = context.to(wide) @ context_factor.to(wide)
    gate = gate.to(x.dtype) if context_index is None else gate.to(x.dtype)[context_index]
    inner = x @ in_factor.to(x.dtype)
    if gate.dim() == 3:
        inner = inner * gate
    else:
        inner = _per_sequence(lambda h, g: h * g, inner, cu_seqlens, gate[:, None])
    y = inner @ out_factor.to(x.dtype)
    y = y if weight is None else y + x @ weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def _per_sequence(fn, x, cu_seqlens, *per_sequence):
    """fn over the batch dimension of x, or over each packed segment of it."""
    if cu_seqlens is None:
        return fn(x, *per_sequence)
    bounds = cu_seqlens.tolist()
    parts = [
        fn(x[i:j], *(t[b] for t in per_sequence)) for b, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    return torch.cat(parts) if parts else fn(x[None], *(t.new_zeros(1, *t.shape[1:]) for t in per_sequence))[0]

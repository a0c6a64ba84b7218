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
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y_b = x_b weight^T + scale (x_b A_b^T) B_b^T + bias, the layout of nn.Linear and PEFT.

    Shapes: x [B, S, D] or packed [N, D] with cu_seqlens [B + 1]; weight [E, D] or None; A [b, r, D]; B [b, E, r];
    adapter_index [B] picks rows of A and B. Returns [B, S, E] or [N, E] in the dtype of x.
    """
    A, B = (t.to(x.dtype) if adapter_index is None else t[adapter_index].to(x.dtype) for t in (A, B))
    low = _per_sequence(lambda x, a, b: (x @ a.mT) @ b.mT, x, cu_seqlens, A, B)
    y = scale * low
    y = y if weight is None else y + F.linear(x, weight.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


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
    gate = (context.to(wide) @ context_factor.to(wide)).to(x.dtype)
    gate = gate if context_index is None else gate[context_index]
    inner = x @ in_factor.to(x.dtype)
    if context.dim() == 3:
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

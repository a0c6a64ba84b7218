"""What callers of the modules get wrong: every error names the argument, what it got and what it must be."""

import pytest
import torch
from torch import nn

import ctxkern
from ctxkern.nn import (
    Bilinear,
    ContextModulatedAttention,
    DynamicLoraLinear,
    EinsumContextModulatedAttention,
    KVCache,
    ModulatedLinear,
    init_bilinear_,
)

B, S, D, E, K, R = 2, 3, 4, 6, 5, 2
zeros = torch.zeros
X, AX, AC = zeros(B, S, D), zeros(B, S, 8), zeros(B, K)
PADDING = zeros(B, S).bool()


def attention(**how):
    return ContextModulatedAttention(8, K, 2, **how)


class Plain(nn.Linear):
    pass


def attend(**how):
    return lambda: attention()(AX, AC, **how)


def swap(mapping, model=None):
    return lambda: ctxkern.swap(model or nn.Sequential(Plain(2, 2)), mapping)


def lora_layer(*adapters, **named):
    return lambda: DynamicLoraLinear(D, E)(X, *adapters, **named)


MASK = "it must be a bool tensor, or one added to scores, that broadcasts to"
# a call, the type of its error and what the message says
CALLS = {
    "d_model-0": (lambda: ContextModulatedAttention(0, K), ValueError, "d_model is 0; it must be a positive integer"),
    "d_model-float": (lambda: ContextModulatedAttention(8.0, K), ValueError, "d_model is 8.0; it must be a positive"),
    "n_heads-0": (
        lambda: ContextModulatedAttention(8, K, 0),
        ValueError,
        "n_heads is 0; it must be a positive integer",
    ),
    "n_heads-3": (lambda: ContextModulatedAttention(8, K, 3), ValueError, "n_heads is 3; it must divide d_model = 8"),
    "n_kv_heads-0": (lambda: attention(n_kv_heads=0), ValueError, "n_kv_heads is 0; it must be a positive integer"),
    "n_kv_heads-3": (lambda: attention(n_kv_heads=3), ValueError, "n_kv_heads is 3; it must divide n_heads = 2"),
    "context_dim--1": (
        lambda: ContextModulatedAttention(8, -1),
        ValueError,
        "context_dim is -1; it must be an integer",
    ),
    "context_dim-str": (lambda: ContextModulatedAttention(8, "5"), ValueError, "context_dim is '5'; it must be an int"),
    "dropout-1": (lambda: attention(dropout=1.0), ValueError, "dropout is 1.0; it must be at least 0 and less than 1"),
    "dropout-negative": (lambda: attention(dropout=-0.1), ValueError, "dropout is -0.1; it must be at least 0"),
    "einsum-n_heads": (
        lambda: EinsumContextModulatedAttention(8, K, 5),
        ValueError,
        "^EinsumContextModulatedAttention: n_heads is 5; it must divide d_model = 8",
    ),
    "init": (lambda: attention(init="zeros"), ValueError, "init is 'zeros'; it must be one of 'normal', 'hyperfan'"),
    "init-linear": (
        lambda: ModulatedLinear(4, 4, 2, init=None),
        ValueError,
        "init is None; it must be one of 'normal'",
    ),
    "init_bilinear_": (
        lambda: init_bilinear_(zeros(2, 2, 2), "xavier"),
        ValueError,
        "^init_bilinear_: init is 'xavier'; it must be one of",
    ),
    "lora-dropout": (
        lambda: DynamicLoraLinear(4, 4, dropout=2.0),
        ValueError,
        "^DynamicLoraLinear: dropout is 2.0; it must be at least 0 and less than 1",
    ),
    "lora-without-b": (lora_layer(zeros(B, R, D)), ValueError, "B is None; it must be a tensor, as A is given"),
    "lora-without-a": (lora_layer(B=zeros(B, E, R)), ValueError, "A is None; it must be a tensor, as B is given"),
    "lora-batch": (lora_layer(zeros(3, R, D), zeros(3, E, R)), ValueError, "A has 3 rows"),
    "linear-x": (lambda: ModulatedLinear(D, E, K)(None, AC), TypeError, "x is a NoneType"),
    "linear-x-1d": (lambda: ModulatedLinear(D, E, K)(zeros(D), AC), ValueError, r"x has shape \[4\]"),
    "linear-packed": (
        lambda: ModulatedLinear(D, E, K)(X[..., None, :], AC, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)),
        ValueError,
        r"x has shape \[2, 3, 1, 4\]",
    ),
    "linear-context": (
        lambda: ModulatedLinear(D, E, K)(X, zeros(B, K + 1)),
        ValueError,
        r"bilinear has shape \[4, 6, 5\]",
    ),
    "bilinear-input2": (
        lambda: Bilinear(D, K, E)(zeros(B, D), zeros(B, D)),
        ValueError,
        r"weight has shape \[6, 4, 5\]",
    ),
    "attention-x": (lambda: attention()(zeros(7, 8), AC), ValueError, r"x has shape \[7, 8\]"),
    "einsum-x": (
        lambda: EinsumContextModulatedAttention(8, K)(zeros(7, 8), AC),
        ValueError,
        r"x has shape \[7, 8\]; it must be \[B, S, D\]",
    ),
    "attention-rows": (lambda: attention()(AX, zeros(3, K)), ValueError, "context has 3 rows"),
    "attention-per-token": (lambda: attention()(AX, zeros(B, 2, K)), ValueError, r"context has shape \[2, 2, 5\]"),
    "attention-context-type": (lambda: attention()(AX, [0.0]), TypeError, "context is a list"),
    "attention-width": (lambda: attention()(zeros(B, S, 4), AC), ValueError, r"bilinear.*\[4, 8, 5\]"),
    "attention-index": (attend(context_index=torch.tensor([0, 5])), ValueError, r"context_index\[1\] is 5"),
    "attention-index-type": (attend(context_index=[0, 1]), TypeError, "context_index is a list"),
    "padding-dtype": (
        attend(key_padding_mask=PADDING.float()),
        TypeError,
        "key_padding_mask is torch.float32; it must be a bool tensor",
    ),
    "padding-type": (
        attend(key_padding_mask=[[True] * S] * B),
        TypeError,
        "key_padding_mask is list; it must be a bool tensor",
    ),
    "padding-shape": (
        attend(key_padding_mask=PADDING[:1]),
        ValueError,
        r"key_padding_mask has shape \[1, 3\]; it must be \[B, T\] = \[2, 3\]",
    ),
    "mask-type": (attend(attn_mask="causal"), TypeError, f"attn_mask is str; {MASK}"),
    "mask-dtype": (attend(attn_mask=zeros(S, S).long()), TypeError, f"attn_mask is torch.int64; {MASK}"),
    "mask-shape": (attend(attn_mask=zeros(S, S + 1)), ValueError, rf"attn_mask has shape \[3, 4\]; {MASK}"),
    "mask-shape-bool": (
        attend(attn_mask=zeros(4, S).bool(), key_padding_mask=PADDING),
        ValueError,
        rf"attn_mask has shape \[4, 3\]; {MASK}",
    ),
    "mask-ndim": (attend(attn_mask=zeros(1, B, 2, S, S)), ValueError, r"attn_mask has shape \[1, 2, 2, 3, 3\]; it"),
    "swap-model": (lambda: ctxkern.swap("model"), TypeError, "model is a str; it must be a torch.nn.Module"),
    "swap-mapping": (swap([Plain]), TypeError, "mapping is a list; it must be a dict"),
    "swap-key": (swap({"Plain": Plain}), TypeError, "mapping has the key 'Plain'; it must be a class of modules"),
    "swap-key-class": (swap({int: int}), TypeError, "mapping has the key .*int.*; it must be a class of modules"),
    "swap-value": (swap({Plain: None}), TypeError, r"mapping\[Plain\] is None; it must be a callable"),
    "swap-result": (
        swap({Plain: lambda layer: layer.weight.data}),
        TypeError,
        "conversion of '0' gave a Tensor; it must be a torch.nn.Module",
    ),
    "swap-root": (
        swap({Plain: lambda layer: layer}, Plain(2, 2)),
        ValueError,
        "model is itself a Plain; it must be a module that holds one",
    ),
    "merge-model": (
        lambda: ctxkern.merge(None, zeros(K)),
        TypeError,
        "model is a NoneType; it must be a torch.nn.Modul",
    ),
    "merge-context-type": (
        lambda: ctxkern.merge(attention(), [0.0] * K),
        TypeError,
        "context is a list; it must be a t",
    ),
    "merge-context-dtype": (
        lambda: ctxkern.merge(attention(), zeros(K).long()),
        TypeError,
        "context is torch.int64; it must be a floating-point tensor",
    ),
    "merge-context-size": (
        lambda: ctxkern.merge(nn.Sequential(attention()), zeros(K + 1)),
        ValueError,
        "context has 6 entries; it must have 5 for layer '0'",
    ),
    "merge-context-rows": (
        lambda: ctxkern.merge(attention(), zeros(2, K)),
        ValueError,
        r"context has shape \[2, 5\]; it must be \[K\] or \[1, K\]",
    ),
    "merge-without-layers": (
        lambda: ctxkern.merge(nn.Linear(2, 2), zeros(K)),
        ValueError,
        "model has no layer to merge; it must have a ContextModulatedAttention",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error


def test_a_failing_swap_leaves_the_model_alone():
    model = nn.Sequential(EinsumContextModulatedAttention(8, K), Plain(2, 2), Plain(2, 2))
    before, given = list(model), []
    with pytest.raises(TypeError, match="conversion of '1' gave a NoneType"):
        ctxkern.swap(model, {Plain: lambda layer: given.append(layer) or (nn.Identity() if len(given) == 1 else None)})
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert type(model[0]) is EinsumContextModulatedAttention


def test_a_failing_call_leaves_the_cache_alone():
    layer, cache = attention(is_causal=True), KVCache()
    layer(AX, AC, cache=cache)
    with pytest.raises(ValueError, match="key_padding_mask"):
        layer(AX[:, :1], AC, cache=cache, key_padding_mask=PADDING)
    assert len(cache) == S

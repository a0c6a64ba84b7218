"""ContextModulatedAttention against its einsum form: values, gradients, masks, caches, states, initialisation."""

import pytest
import torch
from torch.func import functional_call

from ctxkern.nn import (
    ContextModulatedAttention,
    EinsumContextModulatedAttention,
    KVCache,
)
from ctxkern.testing.oracle import check_family

B, S, D, K = 4, 6, 8, 3
# of the layers whose errors are compared: over eight elements the einsum's own may be small by chance
WIDE = 32
RIGHT = torch.arange(S) >= torch.tensor([[6], [3], [1], [5]])
LEFT = RIGHT.flip(1)
WHOLE = RIGHT.clone().index_fill_(0, torch.tensor([2]), True)
BAND = torch.ones(S, S, dtype=torch.bool).triu(-1).tril(1)
BIAS = torch.linspace(-1, 1, S * S).view(1, 1, S, S)

CONFIGS = {
    "one-head": {},
    "heads": {"n_heads": 4},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "bias": True},
    "one-kv-head": {"n_heads": 4, "n_kv_heads": 1, "is_causal": True},
    "causal": {"n_heads": 2, "is_causal": True, "bias": True},
    "no-output-projection": {"n_heads": 2, "out_proj": False},
    "no-context": {"n_heads": 2, "context_dim": 0},
}
CALLS = {
    "plain": {},
    "padding-right": {"key_padding_mask": RIGHT},
    "padding-left": {"key_padding_mask": LEFT},
    "padding-of-a-whole-sequence": {"key_padding_mask": WHOLE},
    "mask-bool": {"attn_mask": BAND},
    "mask-float": {"attn_mask": BIAS},
    "mask-per-head": {"attn_mask": BIAS.expand(B, 1, S, S) > 0.5},
    "mask-and-padding": {"attn_mask": BIAS, "key_padding_mask": LEFT},
    "bool-mask-and-padding": {"attn_mask": BAND, "key_padding_mask": RIGHT},
    "context-index": {"context_index": torch.tensor([2, 0, 2, 1])},
    "context-per-token": {"context_index": None},
}


def layers(seed=0, d_model=D, **config):
    """(fused, einsum): two layers with the same weights."""
    torch.manual_seed(seed)
    config = {"context_dim": K, "init": "hyperfan"} | config
    fused = ContextModulatedAttention(d_model, **config)
    einsum = EinsumContextModulatedAttention(d_model, **config)
    einsum.load_state_dict(fused.state_dict())
    return fused, einsum


def by_name(layer, how):
    """The layer as a function of x, context and its parameters by name."""

    def fn(x, context, **parameters):
        mask = how.get("attn_mask")
        cast = {"attn_mask": mask.to(x.dtype)} if mask is not None and mask.is_floating_point() else {}
        # the softmax is blind to it: its gradient is zero but for rounding
        if layer.W_k_base.bias is not None:
            parameters["W_k_base.bias"] = layer.W_k_base.bias.detach().to(x.dtype)
        return functional_call(layer, parameters, (x, context), how | cast)

    return fn


PROBLEMS = [
    *((config, "context-index", torch.float32) for config in CONFIGS),
    *((config, call, torch.float32) for config in ("grouped", "causal") for call in CALLS if call != "context-index"),
    *(("causal", call, dtype) for dtype in (torch.bfloat16, torch.float64) for call in ("plain", "mask-and-padding")),
    *(("grouped", call, torch.bfloat16) for call in ("context-index", "context-per-token")),
]


@pytest.mark.parametrize(("config", "call", "dtype"), PROBLEMS, ids=str)
def test_equals_the_einsum_layer(config, call, dtype):
    fused, einsum = layers(d_model=WIDE, **CONFIGS[config])
    generator = torch.Generator().manual_seed(1)
    context = torch.randn((B, S, K) if call == "context-per-token" else (B, K), generator=generator)
    tensors = {"x": torch.randn(B, S, WIDE, generator=generator), "context": context[..., : fused.context_dim]}
    tensors |= {name: p.detach() for name, p in fused.named_parameters() if name != "W_k_base.bias"}
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    dout = torch.randn(B, S, WIDE, generator=generator)
    check_family(by_name(fused, CALLS[call]), by_name(einsum, CALLS[call]), tensors, dout)


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_with_nothing_to_attend_to_gives_zeros(float_mask, causal):
    layer, _ = layers(n_heads=2, is_causal=causal, out_proj=False)
    how = {"key_padding_mask": LEFT.index_fill(0, torch.tensor([1]), True)}
    if float_mask:
        how["attn_mask"] = BIAS
    x = torch.randn(B, S, D, requires_grad=True)
    y = layer(x, torch.randn(B, K), **how)
    assert not y[1].any()
    hidden = how["key_padding_mask"].cumprod(1).bool() if causal else how["key_padding_mask"].all(1)[:, None]
    assert not y[hidden.expand(B, S)].any()
    y.square().sum().backward()
    for t in (y, x.grad, *(p.grad for p in layer.parameters())):
        assert torch.isfinite(t).all()


def test_padding_changes_no_other_token():
    layer, _ = layers(n_heads=2)
    x, context = torch.randn(B, S, D), torch.randn(B, K)
    for padding in (RIGHT, LEFT):
        noise = torch.where(padding[:, :, None], torch.full_like(x, 1e3), x)
        a, b = (layer(t, context, key_padding_mask=padding)[~padding] for t in (x, noise))
        assert torch.equal(a, b)
        for row in range(B):
            kept = x[row : row + 1, ~padding[row]]
            alone = layer(kept, context[row : row + 1])
            got = layer(x, context, key_padding_mask=padding)[row, ~padding[row]]
            torch.testing.assert_close(got, alone[0])


class TestCache:
    """Tokens in pieces through a KVCache give what all of them at once give."""

    CHUNKS = {"token-by-token": [1] * S, "chunks": [2, 1, 3], "at-once": [S], "prompt-then-tokens": [4, 1, 1]}

    @pytest.mark.parametrize("padding", [None, RIGHT, LEFT], ids=["no-padding", "right", "left"])
    @pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
    @pytest.mark.parametrize("cls", [ContextModulatedAttention, EinsumContextModulatedAttention])
    def test_pieces_are_the_whole(self, cls, chunks, padding):
        torch.manual_seed(0)
        layer = cls(D, K, 4, n_kv_heads=2, is_causal=True).double().eval()
        x, context = torch.randn(B, S, D).double(), torch.randn(B, K).double()
        whole = layer(x, context, key_padding_mask=padding)
        cache, pieces = KVCache(), []
        for piece in x.split(chunks, 1):
            so_far = len(cache) + piece.shape[1]
            part = None if padding is None else padding[:, :so_far]
            pieces.append(layer(piece, context, key_padding_mask=part, cache=cache))
        assert len(cache) == S
        assert cache.k.shape == (B, 2, S, 2)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)

    def test_with_context_index_and_with_a_context_per_token(self):
        layer = layers(n_heads=2, is_causal=True)[0].double()
        x, index = torch.randn(B, S, D).double(), torch.tensor([2, 0, 2, 1])
        table, each = torch.randn(3, K).double(), torch.randn(B, S, K).double()
        cache, token_cache, pieces, token_pieces = KVCache(), KVCache(), [], []
        for i in range(0, S, 2):
            span = slice(i, i + 2)
            pieces.append(layer(x[:, span], table, context_index=index, cache=cache))
            token_pieces.append(layer(x[:, span], each[:, span], cache=token_cache))
        torch.testing.assert_close(torch.cat(pieces, 1), layer(x, table, context_index=index))
        torch.testing.assert_close(torch.cat(token_pieces, 1), layer(x, each))


class TestState:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_goes_both_ways(self, config):
        fused, einsum = layers(**CONFIGS[config])
        names = {"W_q_base.weight", "W_k_base.weight", "W_v_base.weight", "bilinear_q", "bilinear_k", "bilinear_v"}
        assert names <= fused.state_dict().keys()
        assert [(n, p.shape) for n, p in fused.named_parameters()] == [
            (n, p.shape) for n, p in einsum.named_parameters()
        ]
        back = ContextModulatedAttention(D, **({"context_dim": K} | CONFIGS[config]))
        back.load_state_dict(einsum.state_dict(), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), fused.parameters(), strict=True))

    def test_widths_of_grouped_queries(self):
        layer = ContextModulatedAttention(D, K, 4, n_kv_heads=2)
        assert layer.bilinear_q.shape == (D, D, K)
        assert layer.bilinear_k.shape == layer.bilinear_v.shape == (D, 4, K)
        assert layer.W_k_base.weight.shape == (D, 4)

    def test_dropout_in_training_only(self):
        layer = ContextModulatedAttention(D, K, 2, dropout=0.5)
        x, context = torch.randn(B, S, D), torch.randn(B, K)
        assert not torch.equal(layer(x, context), layer(x, context))
        layer.eval()
        assert torch.equal(layer(x, context), layer(x, context))

    def test_backend_and_workspace_reach_the_call(self):
        fused, einsum = layers(n_heads=2)
        x, context = torch.randn(B, S, D), torch.randn(B, K)
        fused.backend = "reference"
        assert torch.equal(fused(x, context), einsum(x, context))
        fused.backend, fused.workspace_bytes = None, -1
        with pytest.raises(ValueError, match="workspace_bytes is -1"):
            fused(x, context)


@pytest.mark.parametrize("context", [(B, K), (B, S, K)], ids=["a-sequence", "a-token"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"bias": True}, {"out_proj": False}, {"bias": True, "out_proj": False}], ids=str)
def test_dtype_under_autocast_is_that_of_the_einsum_layer(how, parameters, context):
    fused, einsum = (layer.to(parameters) for layer in layers(n_heads=2, **how))
    for x in (torch.randn(B, S, D), torch.randn(B, S, D, dtype=torch.bfloat16)):
        for mask in (None, torch.zeros(S, S)):
            with torch.autocast("cpu", torch.bfloat16):
                got, want = (m(x, torch.randn(context), attn_mask=mask) for m in (fused, einsum))
            assert got.dtype is want.dtype


@pytest.mark.parametrize(
    ("x", "context", "index"),
    [
        ((B, S, D), (1, K), None),
        ((B, S, D), (3, K), (2,)),
        ((1, S, D), (3, K), None),
        ((1, S, D), (3, K), (2, 0, 2, 1)),
        ((B, S, D), (B, 1, K), None),
        ((B, S, D), (1, S, K), None),
        ((1, S, D), (B, S, K), None),
        ((B, 1, D), (1, S, K), None),
    ],
    ids=str,
)
def test_sizes_of_one_are_repeated_as_in_the_einsum_layer(x, context, index):
    fused, einsum = (layer.double() for layer in layers(n_heads=2, is_causal=True))
    index = None if index is None else torch.tensor(index)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (x, context)]
    got, want = (layer(*tensors, context_index=index) for layer in (fused, einsum))
    torch.testing.assert_close(got, want)
    dout = torch.randn(want.shape, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, tensors, dout) for y in (got, want)))


@pytest.mark.parametrize("cls", [ContextModulatedAttention, EinsumContextModulatedAttention])
def test_an_input_that_the_output_projection_cannot_take(cls):
    layer, cache = cls(D, K, 2, is_causal=True), KVCache()
    x, context = torch.randn(B, S, D, dtype=torch.bfloat16), torch.randn(B, K)
    with pytest.raises(TypeError, match="x is bfloat16; it must be float32 like W_o.weight, unless autocast is on"):
        layer(x, context, cache=cache)
    assert len(cache) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, context).dtype is torch.bfloat16
    alone = cls(D, K, 2, out_proj=False)
    assert alone(x, context).dtype is torch.bfloat16

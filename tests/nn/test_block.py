"""The transformer block's forms, against the same written out, and attention's heads against one at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.nn import KVCache
from ctxkern.nn.block import TransformerBlock
from ctxkern.nn.shared import SharedAttention

B, S, D, H = 2, 7, 12, 3


def make(seed=0, **options):
    torch.manual_seed(seed)
    block = TransformerBlock(
        D, 0, H, attention=SharedAttention, is_causal=True, out_bias=True, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block, torch.randn(B, S, D, dtype=torch.float64)


class Head(nn.Module):
    """One head with its own projections, as they are first written."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, width, bias=False, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        weights = self.query(x) @ self.key(x).mT * self.query.out_features**-0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return F.softmax(weights.masked_fill(later, float("-inf")), -1) @ self.value(x)


def test_fused_heads_equal_heads_one_at_a_time_with_gradients():
    block, x = make()
    layer, width = block.attention, D // H
    heads = nn.ModuleList(Head(width) for _ in range(H))
    for i, head in enumerate(heads):
        for name in ("query", "key", "value"):
            whole = getattr(layer, f"W_{name[0]}_base").weight
            getattr(head, name).weight = nn.Parameter(whole[:, i * width : (i + 1) * width].mT.contiguous())
    x.requires_grad_()
    fused = layer(x, None)
    apart = layer.W_o(torch.cat([head(x) for head in heads], -1))
    torch.testing.assert_close(fused, apart)
    along = torch.randn_like(fused)
    weights = [layer.W_q_base.weight, layer.W_k_base.weight, layer.W_v_base.weight]
    got = torch.autograd.grad(fused, [x, *weights], along)
    parts = [getattr(head, name).weight for name in ("query", "key", "value") for head in heads]
    other = torch.autograd.grad(apart, [x, *parts], along)
    expected = [other[0], *(torch.cat([g.mT for g in other[1 + i * H : 1 + (i + 1) * H]], 1) for i in range(3))]
    torch.testing.assert_close(list(got), expected)


WRITTEN = {
    "pre": lambda b, x: (y := x + b.attention(b.attention_norm(x), None)) + b.mlp(b.mlp_norm(y)),
    "post": lambda b, x: b.mlp_norm((y := b.attention_norm(x + b.attention(x, None))) + b.mlp(y)),
    "none": lambda b, x: (y := x + b.attention(x, None)) + b.mlp(y),
}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", WRITTEN)
def test_forms_equal_what_they_stand_for(norm, activation):
    block, x = make(norm=norm, activation=activation)
    assert type(block.mlp[1]) is {"gelu": nn.GELU, "relu": nn.ReLU}[activation]
    torch.testing.assert_close(block(x, None), WRITTEN[norm](block, x))


def test_parts_that_are_left_out():
    block, x = make(norm="none", residual=False, mlp_ratio=0, out_proj=False)
    assert [name for name, _ in block.named_parameters()] == [f"attention.W_{name}_base.weight" for name in "qkv"]
    torch.testing.assert_close(block(x, None), block.attention(x, None))
    block, x = make(norm="post", residual=False)
    expected = block.mlp_norm(block.mlp(block.attention_norm(block.attention(x, None))))
    torch.testing.assert_close(block(x, None), expected)


@pytest.mark.parametrize("norm", WRITTEN)
def test_every_form_is_causal_and_caches(norm):
    block, x = make(norm=norm)
    whole = block(x, None)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(block(changed, None)[:, :4], whole[:, :4])
    assert not torch.allclose(block(changed, None)[:, 4:], whole[:, 4:])
    cache = KVCache()
    parts = [block(x[:, start:stop], None, cache=cache) for start, stop in ((0, 3), (3, 4), (4, S))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_film_follows_the_norm_wherever_it_is():
    torch.manual_seed(0)
    block = TransformerBlock(D, 4, H, film=True, norm="post")
    x, contexts = torch.randn(B, S, D), torch.randn(B, 4)
    plain = block(x, contexts)
    with torch.no_grad():
        block.mlp_film.weight.normal_()
    shift = block.mlp_film(contexts)[:, None]
    scale, shift = shift.chunk(2, -1)
    torch.testing.assert_close(block(x, contexts), plain * (1 + scale) + shift)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, "TransformerBlock: norm is 'rms'; it must be one of pre, post, none"),
        ({"activation": "tanh"}, "TransformerBlock: activation is 'tanh'; it must be one of gelu, relu"),
        ({"mlp_ratio": -1}, "TransformerBlock: mlp_ratio is -1; it must be at least 0"),
        ({"film": True, "norm": "none"}, "TransformerBlock: norm is 'none'; it must be 'pre' or 'post' with film"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(D, 4, H, **options)

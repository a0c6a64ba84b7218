"""`rank=`: layers whose bilinear tensor is kept by its factors."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import ctxkern
from ctxkern.nn import BilinearFactors, ContextModulatedAttention, EinsumContextModulatedAttention, ModulatedLinear
from ctxkern.nn.block import TransformerBlock
from ctxkern.testing.oracle import assert_matches

B, S, D, E, K, R = 4, 6, 16, 12, 8, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(layer, *args, **kwargs):
    layer.zero_grad()
    y = layer(*args, **kwargs)
    y.square().sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("base", [True, False])
def test_a_layer_is_the_whole_one_with_the_tensor_of_its_factors(base):
    layer = ModulatedLinear(D, E, K, base=base, rank=R, init="hyperfan").double()
    whole = ModulatedLinear(D, E, K, base=base).double()
    whole.load_state_dict({n: p for n, p in layer.state_dict().items() if "factor" not in n}, strict=False)
    whole.bilinear.data = layer.bilinear.tensor().detach()
    x, table = torch.randn(B, S, D).double(), torch.randn(2, K).double()
    index = torch.tensor([1, 0, 1, 1])
    for context, spans in ((table, {"context_index": index}), (torch.randn(B, S, K).double(), {})):
        torch.testing.assert_close(layer(x, context, **spans), whole(x, context, **spans))
    bounds = torch.tensor([0, 5, 24], dtype=torch.int32)
    packed = layer(x.flatten(0, 1), table, cu_seqlens=bounds)
    torch.testing.assert_close(packed, whole(x.flatten(0, 1), table, cu_seqlens=bounds))


def test_fused_and_einsum_attention_agree_and_swap():
    einsum = EinsumContextModulatedAttention(D, K, 4, n_kv_heads=2, bias=True, rank=R, init="hyperfan")
    x, table, index = torch.randn(B, S, D), torch.randn(2, K), torch.tensor([1, 0, 1, 1])
    want = gradients(einsum, x, table, context_index=index)
    exact = gradients(deepcopy(einsum).double(), x.double(), table.double(), context_index=index)
    holder = nn.ModuleDict({"attention": einsum})
    assert ctxkern.swap(holder) == ["attention"]
    assert type(einsum) is ContextModulatedAttention
    assert_matches(gradients(einsum, x, table, context_index=index), exact, want)


def test_parameters_and_state():
    layer = ContextModulatedAttention(D, K, 4, rank=R)
    assert sum(p.numel() for n, p in layer.named_parameters() if "bilinear" in n) == 3 * R * (2 * D + K)
    again = ContextModulatedAttention(D, K, 4, rank=R)
    again.load_state_dict(layer.state_dict())
    x, context = torch.randn(B, S, D), torch.randn(B, K)
    assert torch.equal(again(x, context), layer(x, context))
    assert "rank=3" in repr(layer)


def test_compiles_whole():
    layer = ContextModulatedAttention(D, K, 4, rank=R, is_causal=True)
    x, context = torch.randn(B, S, D), torch.randn(B, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), layer(x, context))


def test_from_linear_starts_near_the_layer():
    linear = nn.Linear(D, E)
    layer = ModulatedLinear.from_linear(linear, K, rank=R)
    x = torch.randn(B, S, D)
    torch.testing.assert_close(layer(x, torch.zeros(B, K)), linear(x))
    assert (layer(x, torch.randn(B, K)) - linear(x)).std() < 0.3 * linear(x).std()


@pytest.mark.parametrize("rank", [0, -1, 2.0, "4"])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match=r"rank is .*; it must be a positive integer"):
        BilinearFactors(D, E, K, rank)


def learned(rank, steps=100):
    """The loss before and after a block learns a map for each of four contexts; these differ by matrices of one rank.

    The bilinear tensors have the learning rates that the multi-file training gives them.
    """
    torch.manual_seed(1)
    block = TransformerBlock(D, K, 4, rank=rank)
    table = nn.Parameter(torch.randn(4, K))
    factors = torch.randn(D, 4) / D**0.5, torch.randn(4, 4), torch.randn(4, D) / 2
    maps = torch.randn(D, D) / D**0.5 + torch.einsum("dr,fr,re->fde", *factors)
    bilinear = [p for n, p in block.named_parameters() if "bilinear" in n]
    others = [p for n, p in block.named_parameters() if "bilinear" not in n] + [table]
    scale = 1 / K if rank is None else 1
    optimizer = torch.optim.Adam([{"params": others}, {"params": bilinear, "lr": scale * 1e-2}], lr=1e-2)
    index, losses = torch.arange(16) % 4, []
    for _ in range(steps):
        x = torch.randn(16, 8, D)
        loss = (block(x, table, context_index=index) - x @ maps[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


def test_it_starts_and_trains_as_the_whole_form():
    (start, whole), (factored_start, factored) = learned(None), learned(8)
    assert factored_start == pytest.approx(start, rel=0.25)
    assert factored < 0.25 * start, (start, whole, factored)
    assert factored < 1.5 * whole, (start, whole, factored)

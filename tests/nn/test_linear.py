"""Linear modules: the shapes that nn.Linear takes, their functions, and starting from an nn.Linear."""

import pytest
import torch
from torch import nn

from ctxkern.nn import DynamicLoraLinear, ModulatedLinear

B, D, E, K, R = 4, 8, 5, 3, 2
MIDDLES = {"one-token": (), "tokens": (6,), "grid": (2, 3), "deep": (1, 2, 3), "none": (0,), "empty-grid": (2, 0)}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def modulated():
    torch.manual_seed(0)
    return ModulatedLinear(D, E, K, init="hyperfan").double()


def by_row(layer, x, context):
    """The layer, a sequence at a time, as an ordinary linear map."""
    weights = layer.weight + torch.einsum("dek,bk->bde", layer.bilinear, context)
    return torch.stack([row @ w for row, w in zip(x, weights, strict=True)]) + layer.bias


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_modulated_takes_the_shapes_of_a_linear_layer(modulated, middle):
    x, context = randn(B, *middle, D), randn(B, K)
    torch.testing.assert_close(modulated(x, context), by_row(modulated, x, context))
    index = torch.tensor([2, 0, 2, 1])
    want = by_row(modulated, x, context[index])
    torch.testing.assert_close(modulated(x, context, context_index=index), want)


@pytest.mark.parametrize("middle", [m for m in MIDDLES.values() if m], ids=[n for n, m in MIDDLES.items() if m])
def test_a_context_per_token(modulated, middle):
    x, context = randn(B, *middle, D), randn(B, *middle, K)
    tokens = modulated(x.reshape(-1, D), context.reshape(-1, K))
    torch.testing.assert_close(modulated(x, context), tokens.view(B, *middle, E))


def test_packed_and_indexed(modulated):
    x, table = randn(3, 4, D), randn(2, K)
    index, bounds = torch.tensor([1, 0, 1]), torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    padded = modulated(x, table, context_index=index)
    packed = modulated(x.flatten(0, 1), table, context_index=index, cu_seqlens=bounds)
    torch.testing.assert_close(packed, padded.flatten(0, 1))
    torch.testing.assert_close(padded, modulated(x, table[index]))


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_starts_as_the_layer(bias):
    torch.manual_seed(0)
    linear = nn.Linear(D, E, bias, dtype=torch.float64)
    linear.weight.requires_grad_(False)
    layer = ModulatedLinear.from_linear(linear, K)
    x = randn(2, 4, D)
    y = layer(x, randn(2, K) * 0)
    torch.testing.assert_close(y, linear(x))
    near = layer(x, randn(2, K))
    assert 0 < (near - y).std() < 0.5 * y.std()
    assert layer.weight.dtype is torch.float64
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    assert {n for n, p in layer.named_parameters() if not p.requires_grad} == {"weight"}


def test_without_a_shared_weight():
    layer = ModulatedLinear(D, E, K, base=False, bias=False)
    assert {n for n, _ in layer.named_parameters()} == {"bilinear"}
    assert not layer(torch.randn(2, 4, D), torch.zeros(2, K)).any()


@pytest.mark.parametrize("dropout", [0.0, 0.999999])
@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_lora_takes_the_shapes_of_a_linear_layer(middle, dropout):
    layer = DynamicLoraLinear(D, E, alpha=4, dropout=dropout).double()
    x, low, up = randn(B, *middle, D), randn(B, R, D), randn(B, E, R)
    adapted = torch.stack([row @ (b @ a).mT for row, a, b in zip(x, low, up, strict=True)])
    # in training nearly all of the adapter's input is dropped
    want = layer(x) + (0 if dropout else 2 * adapted)
    torch.testing.assert_close(layer(x, low, up), want)
    torch.testing.assert_close(layer.eval()(x, low, up), layer(x) + 2 * adapted)
    index = torch.tensor([3, 0, 1, 2])
    torch.testing.assert_close(layer(x, low[index], up[index]), layer(x, low, up, adapter_index=index))

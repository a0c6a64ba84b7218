"""swap: einsum layers become fused ones in place, of this package's class and of a user's own."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ctxkern
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention
from ctxkern.testing.einsum import UserAttention, UserAttentionByCall, fused
from ctxkern.testing.oracle import check_family

D, K = 8, 3


class Block(nn.Module):
    """A residual block that hands its context on."""

    def __init__(self, attention):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = attention

    def forward(self, x, context):
        return x + self.attention(self.norm(x), context)


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer) for layer in layers)

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


def einsum_layer(**how):
    return EinsumContextModulatedAttention(D, K, 2, **how)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, D, generator=generator), torch.randn(4, K, generator=generator)


def test_same_objects_same_outputs():
    torch.manual_seed(0)
    model = Model(einsum_layer(), einsum_layer(is_causal=True))
    before, parameters, layers = model(*inputs()), list(model.parameters()), [b.attention for b in model.blocks]
    assert ctxkern.swap(model) == ["blocks.0.attention", "blocks.1.attention"]
    assert all(type(b.attention) is ContextModulatedAttention for b in model.blocks)
    assert all(b.attention is layer for b, layer in zip(model.blocks, layers, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(*inputs()), before)
    assert ctxkern.swap(model) == []


def test_the_root_itself():
    layer = einsum_layer()
    assert ctxkern.swap(layer) == [""]
    assert type(layer) is ContextModulatedAttention


def test_an_optimizer_goes_on():
    torch.manual_seed(0)
    plain = Model(einsum_layer(init="hyperfan")).double()
    swapped = copy.deepcopy(plain)
    x, context = (t.double() for t in inputs())
    for model in (plain, swapped):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if step == 3 and model is swapped:
                assert ctxkern.swap(model) == ["blocks.0.attention"]
            optimizer.zero_grad()
            model(x, context).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(swapped.named_parameters()), dict(plain.named_parameters()))


def test_hooks_and_mode_stay():
    layer, seen = einsum_layer(), []
    layer.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    layer.bilinear_q.register_hook(lambda grad: seen.append("gradient"))
    model = Model(layer, einsum_layer())
    model.blocks[0].eval()
    ctxkern.swap(model)
    model(*inputs()).sum().backward()
    assert seen == [ContextModulatedAttention, "gradient"]
    assert [b.attention.training for b in model.blocks] == [False, True]


def test_a_shared_layer_is_one_layer_still():
    layer = einsum_layer()
    model = Model(layer, layer)
    assert ctxkern.swap(model) == ["blocks.0.attention", "blocks.1.attention"]
    assert model.blocks[0].attention is model.blocks[1].attention is layer
    converted = []
    model = Model(UserAttention(D, K), nn.Identity())
    model.blocks[1].attention = model.blocks[0].attention
    names = ctxkern.swap(model, {UserAttention: lambda old: converted.append(old) or fused(old)})
    assert names == ["blocks.0.attention", "blocks.1.attention"]
    assert len(converted) == 1
    assert model.blocks[0].attention is model.blocks[1].attention


def test_a_subclass_is_left_alone():
    class Mine(EinsumContextModulatedAttention):
        pass

    class Theirs(UserAttention):
        pass

    model = Model(Mine(D, K), Theirs(D, K))
    assert ctxkern.swap(model, {UserAttention: fused}) == []
    assert [type(b.attention) for b in model.blocks] == [Mine, Theirs]


def test_nested_layers_of_a_mapping():
    model = nn.ModuleDict({"outer": Block(UserAttention(D, K)), "other": nn.Sequential(Block(einsum_layer()))})

    found = []

    def rebuild(block):
        found.append(type(block.attention))
        new = Block(block.attention)
        new.norm = block.norm
        return new

    names = ctxkern.swap(model, {UserAttention: fused, Block: rebuild})
    assert names == ["outer", "outer.attention", "other.0", "other.0.attention"]
    assert ContextModulatedAttention in found
    assert UserAttention not in found
    assert type(model["outer"].attention) is ContextModulatedAttention
    assert type(model["other"][0].attention) is ContextModulatedAttention
    model["outer"](*inputs())


def test_training_mode_goes_over_to_converted_layers():
    model = Model(UserAttention(D, K), UserAttention(D, K))
    model.blocks[1].eval()
    ctxkern.swap(model, {UserAttention: fused})
    assert [b.attention.training for b in model.blocks] == [True, False]


def test_a_mapping_may_take_the_packages_own_class():
    model = Model(einsum_layer())
    assert ctxkern.swap(model, {EinsumContextModulatedAttention: lambda old: nn.Identity()}) == ["blocks.0.attention"]
    assert type(model.blocks[0].attention) is nn.Identity


def small(layer):
    """The user's standard normal tensors, scaled so that the softmax is not saturated."""
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(layer, f"bilinear_{name}").mul_(0.1)
    return layer


class TestUsersClass:
    """A class of the user's own, by `swap` and by replacing its einsums with one call."""

    @staticmethod
    def way(name, layer):
        if name == "swap":
            model = nn.Sequential(layer)
            assert ctxkern.swap(model, {UserAttention: fused}) == ["0"]
            assert type(model[0]) is ContextModulatedAttention
            return model[0]
        new = UserAttentionByCall(D, K)
        new.load_state_dict(layer.state_dict(), strict=True)
        return new

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("name", ["swap", "call"])
    def test_values_and_gradients(self, name, dtype):
        torch.manual_seed(0)
        layer = small(UserAttention(D, K))
        new = self.way(name, copy.deepcopy(layer))

        def by_name(module):
            return lambda x, context, **parameters: functional_call(module, parameters, (x, context))

        x, context = inputs()
        tensors = {"x": x, "context": context} | {n: p.detach() for n, p in layer.named_parameters()}
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        check_family(by_name(new), by_name(layer), tensors, inputs(1)[0])

    def test_swapped_parameters_are_the_users(self):
        layer = UserAttention(D, K)
        new = self.way("swap", layer)
        assert {id(p) for p in new.parameters()} == {id(p) for p in layer.parameters()}
        assert {n for n, _ in new.named_parameters()} == {n for n, _ in layer.named_parameters()}

    def test_training_goes_on_after_the_swap(self):
        torch.manual_seed(0)
        plain = nn.ModuleList([small(UserAttention(D, K))]).double()
        swapped = copy.deepcopy(plain)
        x, context = (t.double() for t in inputs())
        for model in (plain, swapped):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for step in range(4):
                if step == 2 and model is swapped:
                    ctxkern.swap(model, {UserAttention: fused})
                optimizer.zero_grad()
                model[0](x, context).square().mean().backward()
                optimizer.step()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(swapped.get_parameter(name), parameter)

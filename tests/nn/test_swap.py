"""swap: einsum layers become fused ones in place, of this package's class and of a user's own."""

import copy
from functools import partial

import pytest
import torch
from helpers.einsum import UserAttention, UserAttentionByCall, fused
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import ctxkern
from ctxkern.nn import (
    ContextModulatedAttention,
    DynamicLoraLinear,
    EinsumContextModulatedAttention,
    ModulatedLinear,
)
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


class TestLeftAlone:
    """Layers that look as if they were meant and are not swapped are named, with the reason, and work as before."""

    @staticmethod
    def check_left(layer, reason, mapping=None, path="blocks.1.attention"):
        model = Model(einsum_layer(), layer)
        cls, before = type(layer), model(*inputs())
        with pytest.warns(UserWarning, match="swap: left as they are") as caught:
            assert ctxkern.swap(model, mapping) == ["blocks.0.attention"]
        assert [str(w.message) for w in caught] == [f"swap: left as they are: {path!r} {reason}"]
        assert type(model.get_submodule(path)) is cls
        torch.testing.assert_close(model(*inputs()), before)

    @pytest.mark.parametrize("method", ["forward", "qkv"])
    def test_a_subclass_with_another_method(self, method):
        def doubled(self, *args, **how):
            y = getattr(EinsumContextModulatedAttention, method)(self, *args, **how)
            return 2 * y if method == "forward" else [2 * t for t in y]

        layer = type("Mine", (EinsumContextModulatedAttention,), {method: doubled})(D, K)
        self.check_left(layer, f"is a Mine, which overrides {method}")

    def test_a_subclass_that_overrides_nothing(self):
        class Mine(EinsumContextModulatedAttention):
            pass

        self.check_left(Mine(D, K), "is a Mine, a subclass: give the mapping a convert for it")

    def test_a_patched_qkv(self):
        layer = einsum_layer()
        qkv = layer.qkv
        layer.qkv = lambda *args: [2 * t for t in qkv(*args)]
        self.check_left(layer, "has its own qkv")

    def test_a_parametrized_layer(self):
        layer = parametrize.register_parametrization(einsum_layer(), "bilinear_q", nn.Tanh())
        self.check_left(layer, "is parametrized: swap it before, or remove the parametrization")

    def test_a_parametrized_layer_of_a_mapping(self):
        layer = parametrize.register_parametrization(UserAttention(D, K), "bilinear_q", nn.Tanh())
        reason = "is parametrized: swap it before, or remove the parametrization"
        self.check_left(layer, reason, {UserAttention: fused})

    def test_a_layer_that_its_conversion_returns(self, recwarn):
        model, given = nn.ModuleDict({"a": nn.Linear(D, D), "head": nn.Linear(D, D)}).eval(), []
        model["head"].train()

        def convert(layer, name):
            given.append(name)
            return layer if name == "head" else ModulatedLinear.from_linear(layer, K)

        head = model["head"]
        assert ctxkern.swap(model, {nn.Linear: convert}) == ["a"]
        assert model["head"] is head
        assert sorted(given) == ["a", "head"]
        assert [m.training for m in (model["a"], head)] == [False, True]
        assert not recwarn.list

    def test_a_subclass_of_a_class_of_the_mapping(self, recwarn):
        class Theirs(UserAttention):
            pass

        model = Model(Theirs(D, K))
        assert ctxkern.swap(model, {UserAttention: fused}) == []
        assert type(model.blocks[0].attention) is Theirs
        assert not recwarn.list


def test_what_is_patched_or_parametrized_elsewhere_is_swapped(recwarn):
    layers = [einsum_layer(bias=True) for _ in range(2)]
    parametrize.register_parametrization(layers[0].W_q_base, "weight", nn.Tanh())
    forward = layers[1].forward
    layers[1].forward = lambda *args, **how: 2 * forward(*args, **how)
    model = Model(*layers)
    before = model(*inputs())
    assert ctxkern.swap(model) == ["blocks.0.attention", "blocks.1.attention"]
    torch.testing.assert_close(model(*inputs()), before)
    assert not recwarn.list


class Language(nn.Module):
    """An embedding tied to its head, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(D, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.embedding.weight


class TestTies:
    REASON = "shares a parameter with another module, which its conversion does not keep"

    def test_a_conversion_that_ends_a_tie_is_not_taken(self):
        model = Language()
        old = [model.head, *model.layers]
        with pytest.warns(UserWarning, match="swap: left as they are") as caught:
            assert ctxkern.swap(model, {nn.Linear: lambda old: ModulatedLinear.from_linear(old, K)}) == ["layers.2"]
        (message,) = (str(w.message) for w in caught)
        assert [f"{n!r} {self.REASON}" in message for n in ("layers.0", "layers.1", "head", "layers.2")] == [1, 1, 1, 0]
        assert [new is layer for new, layer in zip([model.head, *model.layers], old, strict=True)] == [1, 1, 1, 0]
        assert model.head.weight is model.embedding.weight
        assert model.layers[0].weight is model.layers[1].weight

    def test_a_conversion_that_keeps_a_tie_is_taken(self, recwarn):
        def convert(old):
            new = DynamicLoraLinear(D, D, old.bias is not None)
            new.weight, new.bias = old.weight, old.bias
            return new

        model = Language()
        names = ctxkern.swap(model, {nn.Linear: convert})
        assert names == ["layers.0", "layers.1", "layers.2", "head"]
        assert {type(m) for m in (model.head, *model.layers)} == {DynamicLoraLinear}
        assert model.head.weight is model.embedding.weight
        assert model.layers[0].weight is model.layers[1].weight
        assert not recwarn.list

    def test_of_layers_inside_the_converted_one(self, recwarn):
        inner = nn.ModuleList([nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)])
        inner[1].weight = inner[0].weight
        model = nn.ModuleDict({"block": inner})
        assert ctxkern.swap(model, {nn.ModuleList: lambda old: nn.Identity()}) == ["block"]
        assert not recwarn.list


@pytest.mark.parametrize(
    ("convert", "named"),
    [
        (lambda layer: ModulatedLinear.from_linear(layer, K), False),
        (lambda layer, name: ModulatedLinear.from_linear(layer, len(name)), True),
        (lambda layer, rank=2: ModulatedLinear.from_linear(layer, rank), False),
        (lambda *args: ModulatedLinear.from_linear(args[0], len(args)), False),
        (partial(ModulatedLinear.from_linear, context_dim=K), False),
    ],
    ids=["layer", "layer-and-name", "a-default", "any-number", "partial"],
)
def test_a_conversion_takes_the_name_where_it_requires_two(convert, named):
    model = nn.ModuleDict({"seven77": nn.Linear(D, D)})
    assert ctxkern.swap(model, {nn.Linear: convert}) == ["seven77"]
    assert (model["seven77"].context_dim == 7) == named


def test_a_shared_layer_goes_by_its_first_name():
    layer, names = nn.Linear(D, D), []
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert ctxkern.swap(model, {nn.Linear: lambda old, name: names.append(name) or nn.Identity()}) == ["a", "b"]
    assert names == ["a"]
    assert model["a"] is model["b"]


def test_modes_of_parts_that_a_conversion_keeps():
    model = Model(UserAttention(D, K)).eval()
    model.blocks[0].norm.train()

    def rebuild(block):
        new = Block(block.attention)
        new.norm = block.norm
        return new

    assert ctxkern.swap(model, {Block: rebuild}) == ["blocks.0"]
    block = model.blocks[0]
    assert [m.training for m in (block, block.attention, block.norm)] == [False, False, True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(error):
    layer = UserAttention(D, K)
    model = nn.ModuleDict({"first": Block(layer), "again": Block(layer), "einsum": einsum_layer()}).eval()
    before = dict(model.named_modules(remove_duplicate=False))

    def fail(block):
        assert type(block.attention) is ContextModulatedAttention
        raise error

    with pytest.raises(error):
        ctxkern.swap(model, {UserAttention: fused, Block: fail})
    after = dict(model.named_modules(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[n] is m for n, m in before.items())
    assert type(model["einsum"]) is EinsumContextModulatedAttention
    assert not any(m.training for m in after.values())


@pytest.mark.filterwarnings("error")
def test_a_warning_as_an_error_leaves_the_model_as_it_was():
    class Mine(EinsumContextModulatedAttention):
        pass

    model = Model(einsum_layer(), UserAttention(D, K), Mine(D, K))
    with pytest.raises(UserWarning, match="'blocks.2.attention' is a Mine"):
        ctxkern.swap(model, {UserAttention: fused})
    classes = [EinsumContextModulatedAttention, UserAttention, Mine]
    assert [type(b.attention) for b in model.blocks] == classes


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

"""merge: what could make a layer compute something else than its class does is kept in the copy, or refused by name."""

import pytest
import torch
import torch.distributed as dist
from helpers.merged import B, D, K, inputs, new_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import ctxkern
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention, ModulatedLinear


@pytest.fixture
def model():
    return new_model()


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def layer_of(kind):
    torch.manual_seed(0)
    return ModulatedLinear(D, D, K) if kind == "linear" else ContextModulatedAttention(D, K, 2, bias=True)


def check_same(model, call):
    x, context = inputs()
    model.eval()
    torch.testing.assert_close(call(ctxkern.merge(model, context), x), call(model, x))


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize(
    ("register", "words"),
    [
        ("register_forward_hook", "a forward hook"),
        ("register_forward_pre_hook", "a forward pre-hook"),
        ("register_full_backward_hook", "a backward hook"),
        ("register_full_backward_pre_hook", "a backward pre-hook"),
    ],
)
def test_hooks(register, words, with_kwargs, kind):
    model = nn.Sequential(layer_of(kind))
    how = {"with_kwargs": True} if with_kwargs and "forward" in register else {}
    handle = getattr(model[0], register)(lambda *args: None, **how)
    with pytest.raises(ValueError, match=f"layer '0' has {words}; it must have none"):
        ctxkern.merge(model, torch.randn(K))
    handle.remove()
    ctxkern.merge(model, torch.randn(K))


def test_hooks_of_other_modules_stay(model):
    x, context = inputs()
    for module in (model, model.norm, model.attention.W_o):
        module.register_forward_hook(lambda module, args, y: 3 * y)
    torch.testing.assert_close(ctxkern.merge(model, context)(x, None), model(x, context.expand(B, K)))


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (base, method)
        for base in (ContextModulatedAttention, EinsumContextModulatedAttention, ModulatedLinear)
        for method in ("forward", "qkv", "__call__", "__getattr__")
        if hasattr(base, method)
    ],
)
def test_a_subclass_with_another_method(base, method):
    def replaced(self, *args, **how):
        return getattr(base, method)(self, *args, **how)

    layer = type("Mine", (base,), {method: replaced})(D, *((D, K) if base is ModulatedLinear else (K,)))
    with pytest.raises(ValueError, match=f"layer '0' is a Mine, which overrides {method}"):
        ctxkern.merge(nn.Sequential(layer), torch.randn(K))


@pytest.mark.parametrize("base", [ContextModulatedAttention, EinsumContextModulatedAttention, ModulatedLinear])
def test_a_subclass_that_computes_the_same(base):
    class Mine(base):
        def extra_repr(self):
            return "mine"

    layer = Mine(D, *((D, K) if base is ModulatedLinear else (K,)))
    check_same(layer, lambda m, x: m(x, inputs()[1].expand(B, K)))


def test_a_subclass_with_other_weights():
    class Mine(ContextModulatedAttention):
        def projections(self):
            weights, bilinears, biases = super().projections()
            return [w / 2 for w in weights], bilinears, biases

    check_same(Mine(D, K, 2, bias=True), lambda m, x: m(x, inputs()[1].expand(B, K)))


@pytest.mark.parametrize("method", ["forward", "qkv"])
def test_a_method_patched_on_the_instance(method):
    layer = layer_of("attention")
    old = getattr(layer, method)
    setattr(layer, method, lambda *args, **how: old(*args, **how))
    with pytest.raises(ValueError, match=f"the layer has its own {method}"):
        ctxkern.merge(layer, torch.randn(K))


def test_a_class_changed_afterwards():
    class Mine(ModulatedLinear):
        def forward(self, x, context):
            return 2 * super().forward(x, context)

    layer = layer_of("linear")
    layer.__class__ = Mine
    with pytest.raises(ValueError, match="is a Mine, which overrides forward"):
        ctxkern.merge(layer, torch.randn(K))


@pytest.mark.parametrize("path", ["bilinear_q", "W_q_base.weight", "W_k_base.bias", "W_o.weight", "W_o.bias"])
def test_a_parametrized_tensor(path):
    layer = layer_of("attention")
    where, _, name = path.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(where), name, Doubled())
    if not where.startswith("W_o"):
        with pytest.raises(ValueError, match="the layer is parametrized and in training mode"):
            ctxkern.merge(layer, torch.randn(K))
    check_same(layer, lambda m, x: m(x, inputs()[1].expand(B, K)))


@pytest.mark.parametrize("name", ["weight", "bilinear", "bias"])
def test_a_parametrized_tensor_of_a_linear_layer(name):
    layer = layer_of("linear")
    parametrize.register_parametrization(layer, name, Doubled())
    check_same(layer, lambda m, x: m(x, inputs()[1].expand(B, K)))
    assert ctxkern.merge(layer, torch.randn(K)).weight.requires_grad


@pytest.mark.parametrize("path", ["W_q_base.weight", "W_k_base.bias", "W_o.weight", "W_o.bias"])
def test_a_pruned_tensor(path):
    layer = layer_of("attention")
    where, _, name = path.rpartition(".")
    prune.l1_unstructured(layer.get_submodule(where), name, 0.5)
    model = nn.ModuleDict({"layer": layer, "other": prune.l1_unstructured(nn.Linear(D, D), "weight", 0.5)})
    check_same(model, lambda m, x: m["other"](m["layer"](x, inputs()[1].expand(B, K))))


@pytest.mark.parametrize("how", [lambda m: prune.l1_unstructured(m, "weight", 0.5), nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes(how):
    layer = how(layer_of("linear"))
    with pytest.raises(ValueError, match="the layer has a forward pre-hook"):
        ctxkern.merge(layer, torch.randn(K))


def test_sharded_parameters():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(layer_of("attention"))
        fully_shard(model)
        with pytest.raises(TypeError, match="bilinear_q of layer '0' is a DTensor; it must be a plain tensor"):
            ctxkern.merge(model, torch.randn(K))
    finally:
        dist.destroy_process_group()

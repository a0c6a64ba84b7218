"""Contexts and adapters attached to the layers of a model: which ones, what they compute, the way back."""

import copy
import re

import pytest
import torch
from helpers.attached import B, D, K, N, R, S, gradients, new_model, randomise, with_adapters, with_contexts
from torch import nn

import ctxkern
from ctxkern.reference import lora_linear_ref, modulated_linear_ref
from ctxkern.testing.oracle import assert_matches


@pytest.fixture
def model():
    return new_model()


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("blocks.0.up", ["blocks.0.up"]),
        ("up", ["blocks.0.up", "blocks.1.up"]),
        (["1.down", "head"], ["blocks.1.down", "head"]),
        ("blocks.*", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (re.compile(r"blocks\.\d\.(up|down)"), ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (lambda name, layer: layer.out_features == 3, ["head"]),
    ],
)
def test_targets(model, targets, names):
    assert ctxkern.attach_contexts(copy.deepcopy(model), K, targets) == names
    assert ctxkern.attach_adapters(model, N, R, targets) == names


def test_layers_that_cannot_be_attached_to(model):
    before = {name: type(module) for name, module in model.named_modules()}
    cases = [
        ("q_proj", "targets has 'q_proj', which means no layer; linear layers of this model are called down, head, up"),
        ("act", "targets has 'act', which means 'blocks.0.act', a GELU; it must mean an nn.Linear"),
        (["up", "nothing"], "'nothing', which means no layer"),
    ]
    for targets, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            ctxkern.attach_contexts(model, K, targets)
    assert before == {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="targets is empty; it must mean a layer"):
        ctxkern.attach_contexts(model, K, [])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="targets has a int; it must hold names, globs"):
        ctxkern.attach_contexts(model, K, [3])
    with pytest.raises(TypeError, match="model is a function; it must be a torch.nn.Module"):
        ctxkern.attach_contexts(lambda x: x, K, "up")
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        ctxkern.attach_adapters(model, N, 0, "up")
    with pytest.raises(TypeError, match="context_dim is a float; it must be an int"):
        ctxkern.attach_contexts(model, 6.0, "up")
    ctxkern.attach_contexts(model, K, "up")
    with pytest.raises(ValueError, match=r"'blocks.0.up' is attached already, as a ContextLinear"):
        ctxkern.attach_adapters(model, N, R, "up")
    model.blocks[1].down.weight = model.blocks[0].down.weight
    with pytest.raises(ValueError, match=r"'blocks.0.down' shares its weight with 'blocks.1.down'"):
        ctxkern.attach_adapters(model, N, R, "down")
    model.blocks[1].down = model.blocks[0].down
    with pytest.raises(ValueError, match=r"'blocks.0.down' is 'blocks.1.down' too"):
        ctxkern.attach_adapters(model, N, R, "down")
    quantised = nn.Sequential(type("Linear8bit", (nn.Linear,), {})(4, 4))
    with pytest.raises(ValueError, match="is a Linear8bit; it must be exactly an nn.Linear or a Conv1D"):
        ctxkern.attach_adapters(quantised, N, R, "0")
    whole = nn.Sequential(nn.Linear(4, 4))
    whole[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="has a weight of torch.int8; it must be of floats"):
        ctxkern.attach_adapters(whole, N, R, "0")
    parametrized = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="is a ParametrizedLinear; it must be exactly"):
        ctxkern.attach_adapters(parametrized, N, R, "0")
    own = nn.Sequential(nn.Linear(4, 4))
    own[0].forward = lambda x: x
    with pytest.raises(ValueError, match="has a forward of its own"):
        ctxkern.attach_adapters(own, N, R, "0")


def test_the_model_stays_what_it_was(model):
    x, weight, keys = torch.randn(B, S, D), model.blocks[0].up.weight, set(model.state_dict())
    want = model(x)
    with_hook = []
    model.blocks[0].up.register_forward_hook(lambda *_: with_hook.append(1))
    ctxkern.attach_contexts(model, K, "up")
    ctxkern.attach_adapters(model, N, R, "down", alpha=4)
    assert model.blocks[0].up.weight is weight
    assert keys < set(model.state_dict())
    assert isinstance(model.blocks[0].up, nn.Linear)
    with ctxkern.use(model):
        assert torch.equal(model(x), want)
    with ctxkern.use(model, adapter_index=torch.tensor([0, 2, -1, 1])):
        assert torch.equal(model(x), want)
    with ctxkern.use(model, context=torch.randn(B, K)):
        torch.testing.assert_close(model(x), want)
    assert len(with_hook) == 3
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up.bilinear", "down.lora_A", "down.lora_B")}
    with pytest.raises(RuntimeError, match=r"'blocks.0.up' is attached and nothing is in use"):
        model(x)
    ctxkern.detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(x), want)
    assert all(type(m) is not nn.Linear or m.weight.dtype is torch.float32 for m in model.modules())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(B, S, D), (B, D), (B, 2, S, D)])
def test_contexts_compute_the_modulated_map(rank, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 7))
    ctxkern.attach_contexts(model, K, "0", rank=rank, freeze=False)
    randomise(model)
    layer, x, table, index = model[0], torch.randn(shape), torch.randn(3, K), torch.tensor([2, 0, 0, 1])
    bilinear = layer.bilinear if rank is None else layer.bilinear.tensor()
    leaves = [x, table, layer.weight, layer.bias]
    values, exact = (
        [t.detach().to(dtype).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.float64)
    )

    def einsum(x, table, weight, bias):
        tensor = bilinear.detach().to(x.dtype)
        flat = x.reshape(B, -1, D)
        return modulated_linear_ref(flat, table, weight.mT, tensor, bias, context_index=index).view(*shape[:-1], 7)

    def attached(x, table, weight, bias):
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        with ctxkern.use(model, context=table, context_index=index):
            return model(x)

    dy = torch.randn(*shape[:-1], 7)
    found = {}
    for name, fn, given in (("got", attached, values), ("einsum", einsum, values), ("exact", einsum, exact)):
        y = fn(*given)
        dx, dtable = torch.autograd.grad(y, given[:2], dy.to(y.dtype))
        found[name] = {"y": y.detach(), "dx": dx, "dtable": dtable}
    assert_matches(found["got"], found["exact"], found["einsum"])


def test_adapters_compute_the_low_rank_map():
    torch.manual_seed(0)
    model, index = nn.Sequential(nn.Linear(D, 7)), torch.tensor([2, -1, 0, 2])
    ctxkern.attach_adapters(model, N, R, "0", alpha=5)
    randomise(model)
    layer, x, dy = model[0], torch.randn(B, S, D), torch.randn(B, S, 7)
    with ctxkern.use(model, adapter_index=index):
        y = model(x)
    got = {"y": y, **dict(zip("AB", torch.autograd.grad(y, (layer.lora_A, layer.lora_B), dy), strict=True))}
    found = []
    for dtype in (torch.float64, torch.float32):
        x_, w, a, b, bias = (
            t.detach().to(dtype).requires_grad_() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)
        )
        y = lora_linear_ref(x_, w, a, b, 5 / R, bias, adapter_index=index)
        found.append({"y": y, **dict(zip("AB", torch.autograd.grad(y, (a, b), dy.to(dtype)), strict=True))})
    assert_matches(*({n: t.detach() for n, t in each.items()} for each in (got, *found)))


def test_weights_of_a_hypernetwork(model):
    ctxkern.attach_adapters(model, 0, R, ["up", "head"], alpha=4)
    A, weights = torch.randn(B, R, D, requires_grad=True), torch.randn(B, 2 * D, R, requires_grad=True)
    x = torch.randn(B, S, D)
    with ctxkern.use(model, lora={"blocks.1.up": (A, weights)}):
        y = model(x)
    with ctxkern.use(model):
        first = model.blocks[0](x)
        want = first + model.blocks[1].down(
            nn.functional.gelu(model.blocks[1].up(first) + (first @ A.mT) @ weights.mT * 2)
        )
        torch.testing.assert_close(y, model.head(want))
    assert all(t is not None for t in torch.autograd.grad(y.sum(), (A, weights)))
    with pytest.raises(ValueError, match="lora has 'up'; it must name layers of attach_adapters, as 'blocks.0.up'"):
        ctxkern.use(model, lora={"up": (A, weights)})


@pytest.mark.parametrize("rank", [None, 2])
def test_detached_with_a_context(model, rank):
    with_contexts(model, rank=rank)
    x, context = torch.randn(B, S, D), torch.randn(K)
    with ctxkern.use(model, context=context.expand(B, K)):
        want = model(x)
    weight = model.blocks[0].up.weight
    kept = weight.clone()
    with pytest.raises(ValueError, match=r"context has shape \[5\]; layer 'blocks.0.up' needs \[6\]"):
        ctxkern.detach(model, context=torch.randn(5))
    assert ctxkern.detach(model, context=context) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    torch.testing.assert_close(model(x), want)
    assert all(type(m) is nn.Linear for m in (model.blocks[0].up, model.blocks[1].down))
    assert torch.equal(weight, kept)
    with pytest.raises(ValueError, match="no attached layer"):
        ctxkern.detach(model)


def test_detached_with_an_adapter(model):
    with_adapters(model, alpha=4)
    x = torch.randn(B, S, D)
    with ctxkern.use(model, adapter_index=torch.full((B,), 2)):
        want = model(x)
    with pytest.raises(ValueError, match="adapter is 3; layer 'blocks.0.up' has adapters 0 to 2"):
        ctxkern.detach(model, adapter=3)
    with pytest.raises(ValueError, match="context is given and no layer has one"):
        ctxkern.detach(model, context=torch.randn(K))
    ctxkern.detach(model, adapter=2)
    torch.testing.assert_close(model(x), want)


def test_a_bank_trains_in_one_step_as_each_adapter_alone(model):
    with_adapters(model)
    x = torch.randn(N, S, D)
    with ctxkern.use(model, adapter_index=torch.arange(N)):
        model(x).square().sum().backward()
    mixed = gradients(model)
    model.zero_grad()
    for i in range(N):
        with ctxkern.use(model, adapter_index=torch.tensor([i])):
            model(x[i : i + 1]).square().sum().backward()
    for a, b in zip(mixed, gradients(model), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scales_keep_their_precision_in_a_model_that_is_cast(model, dtype):
    with_adapters(model, alpha=1.1)
    scale = model.blocks[0].up.lora_scale.clone()
    model.to(dtype)
    assert model.blocks[0].up.lora_A.dtype is dtype
    assert torch.equal(model.blocks[0].up.lora_scale, scale)
    with ctxkern.use(model, adapter_index=torch.arange(4) - 1):
        assert model(torch.randn(B, S, D, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_float32_next_to_a_half_model(attach):
    model = new_model().bfloat16()
    attach(model)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    how = {"context": torch.randn(B, K)} if attach is with_contexts else {"adapter_index": torch.arange(4) - 1}
    with ctxkern.use(model, **how):
        y = model(torch.randn(B, S, D, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert all(p.grad.dtype is torch.float32 for p in model.parameters() if p.requires_grad and p.grad is not None)


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_models_without_memory_get_it_later(attach):
    with torch.device("meta"):
        model = attach(new_model())
    model.to_empty(device="cpu")
    other = attach(new_model())
    model.load_state_dict(other.state_dict())
    how = {"context": torch.randn(B, K)} if attach is with_contexts else {"adapter_index": torch.arange(4) - 1}
    x = torch.randn(B, S, D)
    with ctxkern.use(model, **how), ctxkern.use(other, **how):
        assert torch.equal(model(x), other(x))

"""merge: a plain copy for one context, which needs nothing of ctxkern to run."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.merged import B, D, K, Model, S, inputs, new_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ctxkern
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention, KVCache, ModulatedLinear
from ctxkern.testing.oracle import assert_matches


@pytest.fixture
def model():
    return new_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attention", [ContextModulatedAttention, EinsumContextModulatedAttention])
@pytest.mark.parametrize("rank", [None, 3])
def test_equals_the_model_under_that_context(rank, attention, dtype):
    torch.manual_seed(0)
    model = Model(attention, rank).to(dtype).eval()
    x, context = inputs(dtype)
    merged = ctxkern.merge(model, context)
    einsum = Model(EinsumContextModulatedAttention, rank).to(dtype)
    einsum.load_state_dict(model.state_dict())
    einsum.head.backend = "reference"
    plain = einsum(x, context.expand(B, K))
    exact = einsum.double()(x.double(), context.double().expand(B, K))
    assert_matches(*({"y": t.detach()} for t in (merged(x, context), exact, plain)))


def test_called_as_before_or_without_a_context(model):
    x, context = inputs()
    merged = ctxkern.merge(model, context)
    want = model(x, context.expand(B, K))
    torch.testing.assert_close(merged(x, context.expand(B, K)), want)
    assert torch.equal(merged(x, None), merged(x, torch.randn(B, K)))
    attention = ctxkern.merge(model.attention, context)
    how = {"key_padding_mask": torch.arange(S) >= torch.tensor([[5], [3], [1]]), "attn_mask": torch.zeros(S, S)}
    index = torch.zeros(B, dtype=torch.int64)
    torch.testing.assert_close(
        attention(x, context_index=index, **how), model.attention(x, context[None], context_index=index, **how)
    )
    head = ctxkern.merge(model.head, context)
    bounds = torch.tensor([0, 4, S], dtype=torch.int32)
    packed = model.head(x[0], context.expand(2, K), cu_seqlens=bounds)
    torch.testing.assert_close(head(x[0], cu_seqlens=bounds), packed)
    torch.testing.assert_close(head(x[0, 0]), packed[0])


def test_a_context_of_one_row(model):
    x, context = inputs()
    assert torch.equal(ctxkern.merge(model, context[None])(x, None), ctxkern.merge(model, context)(x, None))


def test_causal_attention_with_a_cache():
    torch.manual_seed(0)
    layer = ContextModulatedAttention(D, K, 2, is_causal=True)
    x, context = inputs()
    merged, cache = ctxkern.merge(layer, context), KVCache()
    pieces = [merged(token, cache=cache) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x, context.expand(B, K)))


def test_the_model_stays_as_it_is(model):
    x, context = inputs()
    context.requires_grad_()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    layers = [type(m) for m in model.modules()]
    merged = ctxkern.merge(model, context)
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert [type(m) for m in model.modules()] == layers
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    merged(x, None).sum().backward()
    assert context.grad is None
    assert all(p.grad is None for p in model.parameters())


class Allocations(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.numel())
        return out


def test_copies_no_bilinear_tensor():
    layer = nn.Sequential(ContextModulatedAttention(16, 32, 2), ModulatedLinear(16, 16, 32))
    with Allocations() as made:
        merged = ctxkern.merge(layer, torch.randn(32))
    assert 0 < made.largest <= 16 * 32
    assert max(p.numel() for p in merged.parameters()) == 16 * 16
    with Allocations() as made:
        layer[1].bilinear.clone()
    assert made.largest == 16 * 16 * 32


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_runs_no_operator_of_ctxkern(model):
    x, context = inputs()
    with Operators() as seen:
        model(x, context.expand(B, K)).sum().backward()
    assert "ctxkern" in seen.namespaces
    with Operators() as seen:
        ctxkern.merge(model, context)(x, None).sum().backward()
    assert seen.namespaces == {"aten"}


def test_keeps_mode_dtype_buffers_and_sharing():
    attention = ContextModulatedAttention(D, K, 2, dtype=torch.bfloat16, dropout=0.5)
    model = nn.ModuleDict({"a": attention, "b": attention, "norm": nn.BatchNorm1d(3)})
    model["a"].eval()
    merged = ctxkern.merge(model, torch.randn(K))
    assert merged["a"] is merged["b"]
    assert (merged["a"].training, merged["norm"].training) == (False, True)
    assert {p.dtype for p in merged["a"].parameters()} == {torch.bfloat16}
    assert merged["norm"].running_mean is not model["norm"].running_mean
    x = torch.randn(2, 3, D, dtype=torch.bfloat16)
    assert torch.equal(merged["a"](x), merged["a"](x))


def test_other_tools_see_linear_layers(model):
    x, context = inputs()
    merged = ctxkern.merge(model, context)
    linear = {n for n, m in merged.named_modules() if isinstance(m, nn.Linear)}
    assert linear == {"attention.q", "attention.k", "attention.v", "attention.W_o", "head"}
    assert {type(m) for n, m in merged.attention.named_children()} == {nn.Linear}
    assert (merged.head.in_features, merged.head.out_features, merged.head.weight.shape) == (D, 6, (6, D))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
def test_a_quantised_copy_is_called_as_before():
    torch.manual_seed(0)
    layer, (x, context) = ContextModulatedAttention(D, K, 2), inputs()
    merged = ctxkern.merge(layer, context)
    quantised = torch.ao.quantization.quantize_dynamic(merged, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    y, want = quantised(x, context[None]), merged(x)
    assert torch.equal(y, quantised(x))
    # two products in a chain, each of two operands rounded to 127 steps of their largest value
    assert (y - want).square().mean() <= (4 / 127) ** 2 * want.square().mean()


def test_a_copy_can_be_saved_and_copied(model):
    x, context = inputs()
    merged = ctxkern.merge(model, context)
    for other in (pickle.loads(pickle.dumps(merged)), copy.deepcopy(merged)):
        assert torch.equal(other(x, None), merged(x, None))
    fresh = ctxkern.merge(model, torch.randn(K))
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x, None), merged(x, None))


@pytest.mark.parametrize("frozen", [("weight",), ("bilinear",), ("bias",), ("weight", "bilinear", "bias"), ()], ids=str)
def test_what_was_frozen_stays_frozen(frozen):
    layer = ModulatedLinear(D, 6, K)
    attention = ContextModulatedAttention(D, K, 2, bias=True)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
        (attention.bilinear_k if name == "bilinear" else getattr(attention.W_k_base, name)).requires_grad_(False)
    merged, context = ctxkern.merge(nn.ModuleList([layer, attention]), torch.randn(K)), {"weight", "bias"}
    for new in (merged[0], merged[1].k):
        assert {n for n, p in new.named_parameters() if not p.requires_grad} == context & set(frozen)
    assert all(p.requires_grad for p in merged[1].q.parameters())
    alone = ModulatedLinear(D, 6, K, base=False)
    alone.bilinear.requires_grad_("bilinear" not in frozen)
    assert ctxkern.merge(alone, torch.randn(K)).weight.requires_grad == alone.bilinear.requires_grad


def test_ties_between_layers_stay():
    a, b = (ContextModulatedAttention(D, K, 2, bias=True) for _ in range(2))
    other = nn.Linear(D, D)
    b.W_q_base, b.bilinear_q, b.W_v_base.bias = a.W_q_base, a.bilinear_q, a.W_v_base.bias
    b.W_o, other.weight = a.W_o, a.W_o.weight
    merged = ctxkern.merge(nn.ModuleList([other, a, b]), torch.randn(K))
    other, a, b = merged
    assert a.q.weight is b.q.weight
    assert a.q.bias is b.q.bias
    assert a.v.bias is b.v.bias
    assert a.v.weight is not b.v.weight
    assert a.W_o is b.W_o
    assert other.weight is a.W_o.weight


def test_buffers_and_modes_of_parts_stay():
    layer = ContextModulatedAttention(D, K, 2)
    layer.register_buffer("steps", torch.tensor(3))
    layer.W_o.eval()
    merged = ctxkern.merge(layer, torch.randn(K))
    assert merged.steps == 3
    assert merged.steps is not layer.steps
    assert [m.training for m in (merged, merged.q, merged.W_o)] == [True, True, False]


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_those_of_the_model(parameters):
    layers = nn.ModuleList([ModulatedLinear(D, 6, K), ContextModulatedAttention(D, K, 2)]).to(parameters)
    merged = ctxkern.merge(layers, torch.randn(K))
    for dtype in {parameters, torch.bfloat16}:
        x = torch.randn(B, S, D).to(dtype)
        assert merged[0](x).dtype is layers[0](x, torch.randn(B, K).to(dtype)).dtype
        with torch.autocast("cpu", torch.bfloat16):
            for new, old in zip(merged, layers, strict=True):
                assert new(x).dtype is old(x, torch.randn(B, K).to(dtype)).dtype
    if parameters is torch.float32:
        with pytest.raises(TypeError, match="x is bfloat16; it must be float32 like q.weight, unless autocast is on"):
            merged[1](x.bfloat16())


def test_merged_layers_train():
    torch.manual_seed(0)
    layer, (x, context) = ModulatedLinear(D, 6, K), inputs()
    merged = ctxkern.merge(layer, context)
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    first = merged(x).square().mean()
    first.backward()
    optimizer.step()
    assert merged(x).square().mean() < first
    assert {n for n, _ in merged.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize("size", [K - 1, K + 1, 0])
def test_a_context_of_another_size(model, size):
    with pytest.raises(ValueError, match=f"context has {size} entries; it must have {K} for layer 'attention'"):
        ctxkern.merge(model, torch.zeros(size))


LOADER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ctxkern":
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch
program = torch.export.load(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), want)
assert not any(name.split(".")[0] == "ctxkern" for name in sys.modules)
"""


class Alone(nn.Module):
    """The merged model as a function of x alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, None)


def test_an_exported_copy_runs_without_ctxkern(model, tmp_path):
    x, context = inputs()
    merged = Alone(ctxkern.merge(model.eval(), context))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(merged, (x,), dynamic_shapes=({0: batch},))
    files = [str(tmp_path / "merged.pt2"), str(tmp_path / "example.pt")]
    torch.export.save(program, files[0])
    torch.save((x[:2], merged(x[:2]).detach()), files[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, *files], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

"""merge: a plain copy for one context, which needs nothing of ctxkern to run."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ctxkern
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention, KVCache, ModulatedLinear
from ctxkern.testing.oracle import assert_matches

B, S, D, K = 3, 5, 8, 4


class Model(nn.Module):
    """Attention and a modulated head under one context."""

    def __init__(self, attention=ContextModulatedAttention):
        super().__init__()
        self.attention = attention(D, K, 4, n_kv_heads=2, bias=True, init="hyperfan")
        self.norm = nn.LayerNorm(D)
        self.head = ModulatedLinear(D, 6, K, init="hyperfan")

    def forward(self, x, context):
        return self.head(self.norm(self.attention(x, context)), context)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, S, D, generator=generator).to(dtype), torch.randn(K, generator=generator).to(dtype)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attention", [ContextModulatedAttention, EinsumContextModulatedAttention])
def test_equals_the_model_under_that_context(attention, dtype):
    torch.manual_seed(0)
    model = Model(attention).to(dtype).eval()
    x, context = inputs(dtype)
    merged = ctxkern.merge(model, context)
    einsum = Model(EinsumContextModulatedAttention).to(dtype)
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

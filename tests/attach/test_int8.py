"""quantize_bilinear: int8 for inference, with an error that is known and memory that is a quarter."""

import copy

import pytest
import torch
from helpers.attached import B, D, K, Model, N, S, new_model, with_adapters, with_contexts
from torch import nn

import ctxkern
from ctxkern.nn import ContextModulatedAttention, ModulatedLinear
from ctxkern.reference import modulated_linear_ref
from ctxkern.serve import Int8Bilinear
from ctxkern.serve.int8 import int8_modulated_linear
from ctxkern.testing.cases import CASES, DTYPES, make_inputs
from ctxkern.testing.measure import peak_extra_bytes
from ctxkern.testing.oracle import assert_matches

MIB = 1 << 20
# what the CPU computes: no bilinear of halves differs from another one here
KINDS = {name: DTYPES[name] for name in ("f32", "bf16", "bf16-f32-params")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gaussian(d_in, d_out, context_dim):
    return torch.randn(d_in, d_out, context_dim) * 0.01


def uneven(d_in, d_out, context_dim):
    """As training leaves them: rows and columns of unequal size, few directions that matter, and noise."""
    low_rank = torch.einsum("dr,re,kr->dek", torch.randn(d_in, 8), torch.randn(8, d_out), torch.randn(context_dim, 8))
    rows, columns = torch.randn(d_in, 1, 1).exp(), torch.randn(1, d_out, 1).exp()
    return (low_rank + torch.randn(d_in, d_out, context_dim)) * rows * columns * 0.01


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


# root mean square of a rounding error, 1/√12 of a step, by that of a gaussian with the expected largest of K
BOUNDS = {16: 0.0055, 64: 0.0065}


@pytest.mark.parametrize("context_dim", BOUNDS)
@pytest.mark.parametrize("draw", [gaussian, uneven])
def test_the_error_of_weights_and_outputs(draw, context_dim):
    bilinear, context, x = draw(96, 64, context_dim), torch.randn(4, context_dim), torch.randn(4, 8, 96)
    quantised = Int8Bilinear(bilinear)
    errors = [relative(quantised.tensor(), bilinear)]
    weights = torch.einsum("dek,bk->bde", bilinear, context)
    errors.append(relative(torch.einsum("dek,bk->bde", quantised.tensor(), context), weights))
    errors.append(relative(int8_modulated_linear(x, context, None, quantised), torch.bmm(x, weights)))
    assert all(0 < error < BOUNDS[context_dim] for error in errors), errors


def test_a_scale_for_each_pair():
    """One outlier costs its own K values their precision, and no others."""
    bilinear = gaussian(8, 8, 16)
    bilinear[3, 4, 5] = 100.0
    error = (Int8Bilinear(bilinear).tensor() - bilinear).abs()
    largest = bilinear.abs().amax(2, keepdim=True)
    assert (error <= largest / 252).all()
    assert error[3, 4].max() > 0.001
    error[3, 4] = 0
    assert error.max() < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_extreme_values(dtype):
    tiny = torch.finfo(dtype).tiny
    bilinear = torch.tensor([[[0.0, 0.0], [1.0, -1.0]], [[tiny, 0.0], [-3.0, 1e-3]]], dtype=dtype)
    got = Int8Bilinear(bilinear).tensor()
    assert torch.equal(got[0, 0], torch.zeros(2))
    assert ((got - bilinear.float()).abs() <= bilinear.float().abs().amax(2, keepdim=True) / 252 + tiny).all()
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="bilinear has values that are not finite"):
            Int8Bilinear(torch.full((2, 2, 2), value, dtype=dtype))


@pytest.mark.parametrize(("dtype", "param_dtype"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_calls_compute_with_the_dequantised_tensor(case, dtype, param_dtype):
    """Every case of the table against the oracle with the tensor that the int8 one stands for."""
    inputs = make_inputs(case, dtype, param_dtype)
    quantised = Int8Bilinear(inputs.bilinear)
    (x, context, weight, _, bias), how = inputs.arguments()
    got = int8_modulated_linear(x, context, weight, quantised, bias, **how)
    dequantised = quantised.values.double() * quantised.scales.double()[:, :, None]
    double = [None if t is None else t.double() for t in (x, context, weight, dequantised, bias)]
    exact = modulated_linear_ref(*double, **how)
    plain = modulated_linear_ref(x, context, weight, dequantised.to(param_dtype), bias, **how)
    assert_matches(*({"y": y} for y in (got, exact, plain)), case.id)


@pytest.mark.parametrize("rows", [1, 40], ids=["few rows", "many rows"])
def test_memory(rows):
    """A quarter in store; in a call never the whole tensor in floats."""
    bilinear = gaussian(128, 512, 64)
    quantised = Int8Bilinear(bilinear)
    held = quantised.values.nbytes + quantised.scales.nbytes
    assert held == bilinear.nbytes * (1 + 2 / 64) / 4
    assert peak_extra_bytes(lambda: Int8Bilinear(bilinear)) < bilinear.nbytes * 0.8
    # 16 MiB in floats
    x, context, weight = torch.randn(4, rows, 128), torch.randn(4, 64), torch.randn(128, 512)
    peak = peak_extra_bytes(lambda: int8_modulated_linear(x, context, weight, quantised))
    assert peak < 2 * MIB + (0 if rows == 1 else 4 * 128 * 512 * 4 + x.nbytes)


def test_a_context_per_token_takes_parts(monkeypatch):
    monkeypatch.setattr("ctxkern.serve.int8.DEFAULT_WORKSPACE", 8 * 6 * 4)
    x, context, bilinear = torch.randn(3, 7, D), torch.randn(3, 7, K), Int8Bilinear(gaussian(D, 6, K))
    got = int8_modulated_linear(x, context, None, bilinear)
    torch.testing.assert_close(got, modulated_linear_ref(x, context, None, bilinear.tensor()))


@pytest.fixture
def model():
    return with_contexts(new_model())


def near(got, want, share=0.03):
    return (got - want).norm() <= share * want.norm()


@torch.no_grad()
def test_an_attached_model(model):
    x, table, index = torch.randn(B, S, D), torch.randn(N, K), torch.tensor([1, 0, 2, 1])
    whole = copy.deepcopy(model)
    names = ctxkern.quantize_bilinear(model)
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert not any("bilinear" in name for name, _ in model.named_parameters())
    with ctxkern.use(model, context=table, context_index=index), ctxkern.use(whole, context=table, context_index=index):
        got, want = model(x), whole(x)
        assert near(got, want)
        assert not torch.equal(got, want)
        torch.testing.assert_close(model(x.repeat_interleave(2, 0)), got.repeat_interleave(2, 0))
        with ctxkern.cache_weights(model) as cache:
            assert near(model(x), got, 1e-5)
            assert cache.stats().misses == 12
            model.blocks[0].up.bilinear.values.zero_()
            assert not near(model(x), got)
            assert cache.stats().dropped == 3
    merged = copy.deepcopy(model)
    ctxkern.detach(merged, context=table[2])
    with ctxkern.use(model, context=table[2:]):
        assert near(merged(x[:1]), model(x[:1]), 1e-5)
    model.half()
    assert model.blocks[0].up.bilinear.scales.dtype is torch.bfloat16


@torch.no_grad()
def test_quantised_under_a_cache(model):
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table):
        before = model(x)
        ctxkern.quantize_bilinear(model)
        after = model(x)
        assert cache.stats().dropped == 16
    with ctxkern.use(model, context=table):
        assert near(after, model(x), 1e-5)
    assert not torch.equal(before, after)


def test_training_is_refused(model):
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    model.blocks[0].up.weight.requires_grad_()
    ctxkern.quantize_bilinear(model)
    with ctxkern.use(model, context=table):
        with pytest.raises(RuntimeError, match="weight requires a gradient and bilinear is int8; it must be"):
            model(x)
        model.requires_grad_(False)
        assert model(x).grad_fn is None
        with pytest.raises(RuntimeError, match="x requires a gradient and bilinear is int8"):
            model(x.requires_grad_())
        with torch.no_grad():
            model(x)
    with ctxkern.use(model, context=table.requires_grad_()), pytest.raises(RuntimeError, match="context requires"):
        model(x.detach())


def test_what_is_refused(model):
    with pytest.raises(TypeError, match="model is a int; it must be a torch.nn.Module"):
        ctxkern.quantize_bilinear(3)
    for other in (Model(), with_adapters(Model()), with_contexts(Model(), rank=2)):
        with pytest.raises(ValueError, match="model has no layer with a bilinear tensor of floats"):
            ctxkern.quantize_bilinear(other)
    with torch.no_grad():
        model.blocks[1].up.bilinear[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ctxkern.quantize_bilinear(model)
    assert isinstance(model.blocks[0].up.bilinear, nn.Parameter)
    layer = ModulatedLinear(D, 6, K)
    ctxkern.quantize_bilinear(layer)
    x, context = torch.randn(2, S, D), torch.randn(2, K)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"bilinear has shape \[8, 6, 6\]; it must be \[D, E, K\] = \[8, 6, 5\]"):
            layer(x, torch.randn(2, 5))
        with pytest.raises(ValueError, match="context has 3 rows for 2 sequences"):
            layer(x, torch.randn(3, K))
        layer.backend = "cpu"
        with pytest.raises(ValueError, match="backend is 'cpu' and bilinear is int8; it must be None or 'portable'"):
            layer(x, context)
        with pytest.raises(ValueError, match="no layer with a bilinear tensor of floats"):
            ctxkern.quantize_bilinear(layer)


@torch.no_grad()
def test_layers_of_ctxkern_nn_and_merge():
    linear = ModulatedLinear(D, 6, K, init="hyperfan")
    attention = ContextModulatedAttention(D, K, 2, n_kv_heads=1, bias=True, init="hyperfan")
    linear_too = ModulatedLinear(D, 6, K)
    linear_too.bilinear = linear.bilinear
    layers = nn.ModuleList([linear, attention, linear_too])
    x, context = torch.randn(B, S, D), torch.randn(B, K)
    wants = [layer(x, context) for layer in layers]
    assert ctxkern.quantize_bilinear(layers) == ["0", "1", "2"]
    assert linear.bilinear is linear_too.bilinear
    merged = ctxkern.merge(layers, context[1])
    for layer, other, want in zip(layers, merged, wants, strict=True):
        got = layer(x, context)
        assert near(got, want)
        torch.testing.assert_close(other(x[1:2], None), got[1:2])
        for form in (torch.compile(layer, backend="eager", fullgraph=True), copy.deepcopy(layer)):
            torch.testing.assert_close(form(x, context), got)
    fresh = ModulatedLinear(D, 6, K)
    ctxkern.quantize_bilinear(fresh)
    fresh.load_state_dict(linear.state_dict())
    assert torch.equal(fresh(x, context), linear(x, context))


@torch.no_grad()
def test_files(model, tmp_path):
    pytest.importorskip("safetensors")
    plain, again = new_model(), with_contexts(new_model())
    sizes = []
    for quantise in (False, True):
        if quantise:
            ctxkern.quantize_bilinear(model)
            ctxkern.quantize_bilinear(again)
        ctxkern.save_attached(model, tmp_path)
        sizes.append((tmp_path / "attached.safetensors").stat().st_size)
    assert sizes[1] < 0.5 * sizes[0]
    with pytest.raises(ValueError, match="'dtype': 'float32'.* attached; the files have .*'dtype': 'int8'"):
        ctxkern.load_attached(with_contexts(new_model()), tmp_path)
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    for other in (plain, again):
        ctxkern.load_attached(other, tmp_path)
        with ctxkern.use(model, context=table), ctxkern.use(other, context=table):
            assert torch.equal(other(x), model(x))


def test_the_operator_is_one_that_torch_takes():
    bilinear = Int8Bilinear(gaussian(D, 6, K))
    args = (
        torch.randn(2, S, D),
        torch.randn(2, K),
        torch.randn(D, 6),
        bilinear.values,
        bilinear.scales,
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.ctxkern.int8_forward.default, args)
    args = (*args[:6], torch.tensor([1, 0]), None)
    torch.library.opcheck(torch.ops.ctxkern.int8_forward.default, args)

"""cache_weights: weights of contexts kept between calls; the same results, within its bytes, never stale."""

import copy
import pickle

import pytest
import torch
from helpers.attached import (
    INDEX,
    B,
    D,
    K,
    Model,
    N,
    S,
    assert_near,
    near,
    outside,
    with_adapters,
    with_contexts,
)
from torch import nn

import ctxkern
from ctxkern.nn import ContextModulatedAttention, ModulatedLinear
from ctxkern.reference import modulated_linear_ref
from ctxkern.testing.cases import CASES, DTYPES, make_inputs
from ctxkern.testing.oracle import assert_matches

PADDED = [case for case in CASES if case.lengths is None and not case.per_token]


pytestmark = pytest.mark.usefixtures("without_gradients")


def layer_of(inputs):
    """(ModulatedLinear with the parameters of a case, (x, context), keywords)."""
    d_in, d_out, context_dim = inputs.bilinear.shape
    layer = ModulatedLinear(d_in, d_out, context_dim, inputs.bias is not None, base=inputs.weight is not None)
    for name in ("weight", "bilinear", "bias"):
        value = getattr(inputs, name)
        setattr(layer, name, None if value is None else nn.Parameter(value))
    return layer, (inputs.x, inputs.context), {"context_index": inputs.context_index}


@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.id)
def test_kept_weights_give_the_results_of_the_oracle(case, dtype, param_dtype):
    inputs = make_inputs(case, dtype, param_dtype)
    layer, args, how = layer_of(inputs)
    with ctxkern.cache_weights(layer, dtype=dtype) as cache:
        first, again = layer(*args, **how), layer(*args, **how)
        counts = cache.stats()
    assert torch.equal(first, again)
    if inputs.x.numel() and inputs.bilinear.numel() and inputs.context.numel():
        assert counts.uncached == 0
        assert counts.hits == counts.misses > 0
    plain = modulated_linear_ref(*inputs.arguments()[0], **inputs.arguments()[1])
    double = inputs.map(lambda t: t.double())
    exact = modulated_linear_ref(*double.arguments()[0], **double.arguments()[1])
    assert_matches(*({"y": y.detach()} for y in (first, exact, plain)), case.id)


def test_an_attached_model_computes_the_same(model):
    x, table = torch.randn(B, S, D), torch.randn(N, K)
    want = outside(model, x, table)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table, context_index=INDEX):
        assert_near(model(x), want)
        assert cache.stats()[:5] == (0, 12, 0, 0, 0)
        assert_near(model(x), want)
        assert cache.stats()[:5] == (12, 12, 0, 0, 0)
        # beams: a row of the index for three of the batch
        assert_near(model(x.repeat_interleave(3, 0)), want.repeat_interleave(3, 0))
        assert cache.stats()[:5] == (24, 12, 0, 0, 0)
    with ctxkern.use(model, context=table, context_index=INDEX):
        assert torch.equal(model(x), want)
    assert cache.stats().bytes == 0


@pytest.mark.parametrize("index", [[0, 1, 2, 0], [2, 1, 0, 2], [0, 0, 2, 2], [1, 1, 1, 1]], ids=str)
def test_contexts_are_known_by_their_values(model, index):
    """In any order, in part, repeated, from another table; in runs of slots with gaps and unequal counts."""
    x, table = torch.randn(B, S, D), torch.randn(5, K)
    with ctxkern.cache_weights(model) as cache:
        with ctxkern.use(model, context=table):
            model(torch.randn(5, S, D))
        before = cache.stats()
        other = table[2:].clone()
        with ctxkern.use(model, context=other, context_index=torch.tensor(index)):
            got = model(x)
        after = cache.stats()
    assert_near(got, outside(model, x, other, torch.tensor(index)))
    assert after.misses == before.misses
    assert after.hits == before.hits + 4 * len(set(index))


def test_its_bytes_are_a_bound_and_the_least_recently_used_leave(model):
    table = torch.randn(6, K)
    one = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and m.out_features != 3)
    with ctxkern.cache_weights(model, max_bytes=3 * one + one // 2) as cache:
        assert (cache.context_bytes, cache.max_contexts) == (one, 3)

        def met(*rows):
            x, before = torch.randn(len(rows), S, D), cache.stats()
            with ctxkern.use(model, context=table[list(rows)]):
                got = model(x)
            want = outside(model, x, table, torch.tensor(rows))
            assert_near(got, want)
            after = cache.stats()
            assert after.bytes <= 3 * one + one // 2
            assert after.contexts <= 3
            return tuple((b - a) // (1 if n == 2 else 4) for n, (a, b) in enumerate(zip(before, after, strict=True)))[
                :3
            ]

        # (hits, misses, evictions) in contexts
        assert met(0) == (0, 1, 0)
        assert met(1) == (0, 1, 0)
        assert met(2) == (0, 1, 0)
        assert met(0) == (1, 0, 0)
        # 1 is the oldest
        assert met(3) == (0, 1, 1)
        assert met(0, 2, 3) == (3, 0, 0)
        assert met(1) == (0, 1, 1)
        assert met(2, 3) == (2, 0, 0)
        assert met(0) == (0, 1, 1)
        # a batch keeps what it has itself
        assert met(4, 2, 3) == (2, 1, 1)
        # more than there is room for: all as before
        uncached = cache.stats().uncached
        assert met(0, 1, 2, 3) == (0, 0, 0)
        assert cache.stats().uncached == uncached + 8
        assert met(4, 2, 3) == (3, 0, 0)
        cache.clear()
        assert (cache.stats().contexts, cache.stats().bytes) == (0, 0)
        assert met(4) == (0, 1, 0)


def written(layer):
    layer.weight.add_(1)


def written_bilinear(layer):
    layer.bilinear.mul_(2)


def replaced(layer):
    layer.bilinear = nn.Parameter(layer.bilinear * 2)


def loaded(layer):
    layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})


def moved(layer):
    layer.bilinear.data = layer.bilinear.data * 2


def stepped(layer):
    with torch.enable_grad():
        optimizer = torch.optim.SGD([layer.bilinear], lr=1.0)
        layer.bilinear.sum().backward()
        optimizer.step()
        layer.bilinear.grad = None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [written, written_bilinear, replaced, loaded, moved, stepped])
def test_weights_of_changed_parameters_are_dropped(model, change, mode):
    x, table = torch.randn(B, S, D), torch.randn(N, K)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table, context_index=INDEX):
        with mode():
            before = model(x)
        change(model.blocks[1].up)
        with mode():
            after = model(x)
        want = outside(model, x, table)
        assert_near(after, want)
        assert not near(before, want)
        assert cache.stats().dropped == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("which", ["table", "index"])
def test_a_changed_context_is_made_anew(model, which, mode):
    x, table, index = torch.randn(B, S, D), torch.randn(N, K), INDEX.clone()
    with ctxkern.cache_weights(model), ctxkern.use(model, context=table, context_index=index), mode():
        before = model(x)
        if which == "table":
            table[1] = torch.randn(K)
        else:
            index[0] = 2
        after = model(x)
        with torch.inference_mode(False):
            want = outside(model, x, table, index)
        assert_near(after, want)
        assert not near(before, after)


def test_a_table_made_in_inference_mode_is_read_each_time(model):
    with ctxkern.cache_weights(model) as cache, torch.inference_mode():
        x, table = torch.randn(N, S, D), torch.randn(N, K)
        for _ in range(2):
            with ctxkern.use(model, context=table):
                got = model(x)
            with torch.inference_mode(False):
                want = outside(model, x.clone(), table.clone(), torch.arange(N))
            assert_near(got, want)
            table.add_(1)
        assert cache.stats().misses == 24
    x, table = x.clone(), table.clone()
    with ctxkern.cache_weights(model), ctxkern.use(model, context=table):
        with torch.inference_mode():
            first = model(x)
        assert torch.equal(model(x), first)


def test_with_gradients_it_is_left_out(model):
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table):
        model(x)
        with torch.enable_grad():
            loss = model(x).square().sum()
            loss.backward()
        assert all(layer.bilinear.grad.any() for block in model.blocks for layer in (block.up, block.down))
        assert cache.stats().hits == 0
        assert cache.stats().uncached == 4
        model.requires_grad_(False)
        with torch.enable_grad():
            model(x)
            assert cache.stats().hits == 16
            model(x.requires_grad_()).sum().backward()
            assert x.grad.any()
            table.requires_grad_()
            model(x.detach()).sum().backward()
            assert table.grad.any()


def test_compiled_models_compute_without_it(model):
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table):
        want = model(x)
        counts = cache.stats()
        assert_near(compiled(x), want)
        assert cache.stats() == counts


def test_what_it_does_not_keep(model):
    """Contexts per token, packed sequences, other dtypes: computed as before, and counted."""
    with ctxkern.cache_weights(model) as cache:
        x, table = torch.randn(2, 3, D), torch.randn(2, 3, K)
        with ctxkern.use(model, context=table):
            model(x)
        assert cache.stats().uncached == 4
        bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
        with ctxkern.use(model, context=table[0, :2], cu_seqlens=bounds):
            packed = model(x.view(1, 6, D))
        assert cache.stats().uncached == 8
        with ctxkern.use(model, context=table[0, :2]):
            assert_near(packed.view(2, 3, 3), model(x))
        with torch.autocast("cpu", torch.bfloat16), ctxkern.use(model, context=table[0, :2]):
            model(x)
        assert cache.stats().misses == 8
        assert cache.stats().uncached == 12
    with ctxkern.cache_weights(model, dtype=torch.bfloat16) as cache, torch.autocast("cpu", torch.bfloat16):
        with ctxkern.use(model, context=table[0, :2]):
            got = model.blocks[0].up(x)
        with torch.enable_grad(), ctxkern.use(model, context=table[0, :2]):
            want = model.blocks[0].up(x)
        assert got.dtype is want.dtype is torch.bfloat16
        assert_near(got, want)
        assert cache.stats().misses == 2


def test_errors_are_those_of_the_layer(model):
    used = ctxkern.use(model, context=torch.randn(2, K), context_index=torch.tensor([0, 1, 2]))
    with ctxkern.cache_weights(model), used, pytest.raises(ValueError, match="context_index"):
        model(torch.randn(3, S, D))
    layer = ModulatedLinear(D, 6, K)
    with ctxkern.cache_weights(layer):
        with pytest.raises(ValueError, match="context has 2 rows for 4 sequences"):
            layer(torch.randn(4, S, D), torch.randn(2, K))
        with pytest.raises(TypeError, match="context is a NoneType"):
            layer(torch.randn(4, S, D), None)
        # a named backend computes, or says why not
        layer.backend = "cuda"
        with pytest.raises(RuntimeError, match="cuda"):
            layer(torch.randn(4, S, D), torch.randn(4, K))


def test_what_is_refused(model):
    with pytest.raises(TypeError, match="model is a function; it must be a torch.nn.Module"):
        ctxkern.cache_weights(lambda x: x)
    with pytest.raises(TypeError, match="max_bytes is a float; it must be an int"):
        ctxkern.cache_weights(model, 1e9)
    with pytest.raises(TypeError, match="dtype is torch.int8; it must be None or a dtype of floats"):
        ctxkern.cache_weights(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="max_bytes is 2047; it must be at least 2048, which the weights of"):
        ctxkern.cache_weights(model, 2047)
    for other in (Model(), with_adapters(Model()), with_contexts(Model(), rank=2)):
        with pytest.raises(ValueError, match="model has no layer whose weights can be kept"):
            ctxkern.cache_weights(other)
    with ctxkern.cache_weights(model.blocks[1]), pytest.raises(ValueError, match="layer 'blocks.1.up' has a cache"):
        ctxkern.cache_weights(model)
    ctxkern.cache_weights(model).close()


def test_copies_and_detached_layers_have_none(model):
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table):
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.blocks[0].up.weight_cache is None
            with ctxkern.use(other, context=table):
                assert_near(other(x), want)
        assert cache.stats().misses == 16
        merged = copy.deepcopy(model)
        ctxkern.detach(merged, context=table[1])
        assert_near(merged(x[1:2]), want[1:2])
        ctxkern.detach(model)
        assert not any("weight_cache" in vars(m) for m in model.modules())


@pytest.mark.parametrize("rows", [1, B])
def test_attention_keeps_all_three(rows):
    torch.manual_seed(0)
    layer = ContextModulatedAttention(D, K, 2, n_kv_heads=1, bias=True, init="hyperfan", is_causal=True)
    x, table = torch.randn(B, S, D), torch.randn(rows, K)
    want = layer(x, table)
    with ctxkern.cache_weights(layer) as cache:
        for _ in range(2):
            assert_near(layer(x, table), want)
        assert cache.stats()[:5] == (3 * rows, 3 * rows, 0, 0, 0)


def test_vmap_computes_without_it():
    layer = ModulatedLinear(D, 6, K)
    x, table = torch.randn(3, B, S, D), torch.randn(B, K)
    with ctxkern.cache_weights(layer):
        got = torch.vmap(lambda each: layer(each, table))(x)
    assert_near(got, torch.stack([layer(each, table) for each in x]))

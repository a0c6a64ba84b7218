"""lora_linear and DynamicLoraLinear: against the oracle, and against what they extend."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from helpers.backends import best, everywhere, on
from helpers.threads import the_same_by
from torch import nn

import ctxkern
from ctxkern.nn import DynamicLoraLinear
from ctxkern.reference import lora_dropout_mask, lora_linear_ref
from ctxkern.testing.cases import CASES, Case
from ctxkern.testing.families import LOW_RANK_CASES, lora_arguments
from ctxkern.testing.force import force
from ctxkern.testing.oracle import check_family, differentiate

# dtypes of x, the adapters and the weight
DTYPES = {
    "f32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16, torch.float16),
    "f64": (torch.float64, torch.float64, torch.float64),
    "bf16-f32-adapters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "f16-f32-adapters": (torch.float16, torch.float32, torch.float16),
    "bf16-f32-weight": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16-f32-both": (torch.bfloat16, torch.float32, torch.float32),
}
BY_ID = {case.id: case for case in LOW_RANK_CASES}


@pytest.fixture
def fn(request):
    with on(request.param, ctxkern.lora_linear) as fn:
        yield fn


@everywhere
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_case_table(fn, dtypes):
    if dtypes[0] is torch.float64:
        fn = functools.partial(ctxkern.lora_linear, backend="portable")
    for case in LOW_RANK_CASES:
        arguments, dout = lora_arguments(case, 3, *dtypes)
        check_family(fn, lora_linear_ref, arguments, dout, case.id)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks(fn, dtype):
    for rank in (0, 1, 2, 5, 16, 33, 65, 256, 300):
        for name in ("odd", "shared-uneven", "ragged-shared"):
            arguments, dout = lora_arguments(BY_ID[name], rank, dtype)
            check_family(fn, lora_linear_ref, arguments, dout, f"{name}, rank {rank}")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes(fn, dtype):
    """Zero and around the sizes of tiles, strips and blocks, with and without a base weight."""
    sizes = [(2, 0, 5, 6), (0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0), (1, 1, 1, 1), (2, 300, 31, 129), (3, 17, 257, 64)]
    sizes += [(2, 17, 2048, 40), (2, 17, 40, 2048)]  # rows that share a set of the first cache
    for B, S, D, E in sizes:
        for weight in (False, True):
            case = Case("sizes", B, S, D, E, 1, weight=weight, bias=weight)
            arguments, dout = lora_arguments(case, 4, dtype)
            check_family(fn, lora_linear_ref, arguments, dout, f"{B, S, D, E}")


@best
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [Case("few", 2, 700, 96, 160, 1), Case("uneven", 6, 90, 64, 32, 1, index=[0] * 5 + [1])]
)
def test_long_sums_and_many_blocks(fn, dtype, case):
    arguments, dout = lora_arguments(case, 16, dtype)
    check_family(fn, lora_linear_ref, arguments, dout)
    case = dataclasses.replace(case, D=3000, S=40)
    arguments, dout = lora_arguments(case, 16, dtype)
    check_family(fn, lora_linear_ref, arguments, dout)


@best
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared", "no-weight"])
class TestOptions:
    def test_sequences_without_an_adapter(self, fn, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        bounds = arguments["cu_seqlens"]
        sequences = len(arguments["x"]) if bounds is None else len(bounds) - 1
        rows = len(arguments["A"])
        for index in ([-1] * sequences, [(b % (rows + 1)) - 1 for b in range(sequences)], [-1] + [0] * (sequences - 1)):
            arguments["adapter_index"] = torch.tensor(index)
            check_family(fn, lora_linear_ref, arguments, dout, str(index))

    def test_a_rank_for_each_adapter(self, fn, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 20, dtype)
        count = len(arguments["A"])
        ranks = torch.tensor([(0, 20, 7, 16, 17, 1)[i % 6] for i in range(count)])
        check_family(fn, lora_linear_ref, arguments | {"ranks": ranks}, dout)
        # what lies behind a rank is not read
        clean = differentiate(fn, arguments | {"ranks": ranks}, dout)
        for i, rank in enumerate(ranks):
            arguments["A"][i, rank:] = arguments["B"][i, :, rank:] = float("nan")
        dirty = differentiate(fn, arguments | {"ranks": ranks}, dout)
        for result, value in dirty.items():
            assert torch.equal(value, clean[result]), result

    def test_a_scale_for_each_adapter(self, fn, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        del arguments["scale"]
        scale = torch.randn(len(arguments["A"]), generator=torch.Generator().manual_seed(0))

        def reference(**tensors):
            return lora_linear_ref(**tensors, scale=scale.to(tensors["x"].dtype))

        check_family(functools.partial(fn, scale=scale), reference, arguments, dout)

    def test_dropout_by_the_mask_of_the_reference(self, fn, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        for seed in (0, -5, 1 << 62):
            dropped = arguments | {"dropout": 0.3, "seed": seed}
            check_family(fn, lora_linear_ref, dropped, dout)
        index = torch.tensor([-1, 0] * len(dout))[: len(dout)]
        if arguments["cu_seqlens"] is None:
            check_family(fn, lora_linear_ref, dropped | {"adapter_index": index}, dout)

    def test_each_gradient_alone(self, fn, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        arguments |= {"dropout": 0.2, "seed": 3}
        everything = differentiate(fn, arguments, dout)
        for result in everything:
            leaf = result[1:]
            if leaf in arguments and arguments[leaf] is not None:
                given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
                (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
                assert torch.equal(alone, everything[result]), result


@best
def test_threads_and_other_sequences_change_no_bit(fn):
    case = Case("batch", 9, 70, 96, 80, 1, rows=4, index=[0, 1, 2, 3, 0, 1, 2, 3, 0])
    for dtype, dropout in itertools.product((torch.float32, torch.bfloat16), (0.0, 0.25)):
        arguments, dout = lora_arguments(case, 8, dtype)
        arguments |= {"weight": None, "bias": None, "dropout": dropout, "seed": 3}
        found = the_same_by((1, 2, 5), functools.partial(differentiate, fn, arguments, dout))
        if fn.keywords["backend"] == "cpu" and not dropout:
            alone = [b for b, u in enumerate(case.index) if u == 2]
            picked = arguments | {"x": arguments["x"][alone], "adapter_index": torch.tensor([2, 2])}
            part = differentiate(fn, picked, dout[alone])
            for name in ("y", "dx"):
                assert torch.equal(part[name], found[name][alone]), name
            for name in ("dA", "dB"):
                assert torch.equal(part[name][2], found[name][2]), name


def test_a_frozen_base_costs_no_gradient():
    arguments, dout = lora_arguments(BY_ID["odd"], 3)
    x, A = arguments["x"].requires_grad_(), arguments["A"].requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.autograd.grad(ctxkern.lora_linear(**arguments), [x, A], dout)
    assert counter.get_total_flops() > 0
    with pytest.raises(RuntimeError, match="not require grad|not have been used"):
        torch.autograd.grad(ctxkern.lora_linear(**arguments), [arguments["weight"]], dout)


def test_a_seed_is_drawn_from_the_generator():
    arguments, _ = lora_arguments(BY_ID["odd"], 3)
    arguments["dropout"] = 0.5
    torch.manual_seed(1)
    first, second = ctxkern.lora_linear(**arguments), ctxkern.lora_linear(**arguments)
    torch.manual_seed(1)
    assert torch.equal(first, ctxkern.lora_linear(**arguments))
    assert not torch.equal(first, second)
    tensor = ctxkern.lora_linear(**arguments, seed=torch.tensor([7]))
    assert torch.equal(tensor, ctxkern.lora_linear(**arguments, seed=7))


def test_the_mask_is_even():
    """Shares of rows, columns, and pairs of neighbours, within five standard deviations."""
    mask = lora_dropout_mask(11, 512, 2048, 0.25).double()

    def near(values, p, n):
        assert (values - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5

    near(mask.mean(1), 0.75, 2048)
    near(mask.mean(0), 0.75, 512)
    near((mask[1:] * mask[:-1]).mean(1), 0.75**2, 2048)
    near((mask[:, 1:] * mask[:, :-1]).mean(0), 0.75**2, 512)
    near((mask * lora_dropout_mask(12, 512, 2048, 0.25)).mean(1), 0.75**2, 2048)


@pytest.mark.parametrize("scale", [0, 1, -2.5, 1e-3])
def test_scales(scale):
    arguments, dout = lora_arguments(CASES[2], 3, scale=scale)
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


@best
@pytest.mark.parametrize("workspace", [1, 1 << 10])
@pytest.mark.parametrize("dtypes", [DTYPES["f32"], DTYPES["bf16-f32-both"]], ids=["f32", "bf16-f32-both"])
def test_little_workspace(fn, monkeypatch, dtypes, workspace):
    monkeypatch.setattr(ctxkern.functional, "DEFAULT_WORKSPACE", workspace)
    for name in ("odd", "shared-uneven", "ragged-shared", "no-weight"):
        arguments, dout = lora_arguments(BY_ID[name], 3, *dtypes)
        check_family(fn, lora_linear_ref, arguments, dout, name)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_adapters(fn, dtype):
    arguments, dout = lora_arguments(CASES[2], 3, dtype)
    arguments["A"] = arguments["A"].mT.contiguous().mT
    arguments["B"] = arguments["B"].repeat_interleave(2, -1)[..., ::2]
    arguments["weight"] = arguments["weight"].repeat_interleave(2, 0)[::2]
    arguments["x"] = arguments["x"].mT.contiguous().mT
    check_family(fn, lora_linear_ref, arguments, dout.mT.contiguous().mT)


@best
def test_one_adapter_for_all_expanded(fn):
    arguments, dout = lora_arguments(CASES[2], 3)
    for name in ("A", "B"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    check_family(fn, lora_linear_ref, arguments, dout)


def adapters(batch=3, rank=2, d_in=6, d_out=4):
    return torch.randn(batch, rank, d_in), torch.randn(batch, d_out, rank)


X = torch.randn(3, 5, 6)


class TestModule:
    def test_without_adapters_it_is_the_linear_layer(self):
        torch.manual_seed(0)
        plain = nn.Linear(6, 4)
        torch.manual_seed(0)
        layer = DynamicLoraLinear(6, 4, alpha=3, dropout=0.5)
        assert layer.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(layer(X), plain(X))
        x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
        layer(x).sum().backward()
        plain(again).sum().backward()
        assert torch.equal(x.grad, again.grad)
        assert torch.equal(layer.weight.grad, plain.weight.grad)

    @pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4, 2.0), (1, 0.5), (0, 0.0)])
    def test_scale_is_alpha_over_rank(self, alpha, scale):
        layer = DynamicLoraLinear(6, 4, alpha=alpha)
        A, B = adapters()
        want = ctxkern.lora_linear(X, layer.weight, A, B, scale, layer.bias)
        assert torch.equal(layer(X, A, B), want)

    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_a_merged_layer_a_sequence(self, bias):
        layer = DynamicLoraLinear(6, 4, bias, alpha=3)
        A, B = adapters()
        y = layer(X, A, B)
        for b in range(3):
            merged = layer.weight + 1.5 * B[b] @ A[b]
            torch.testing.assert_close(y[b], F.linear(X[b], merged, layer.bias))

    def test_adapter_index_and_packed_sequences(self):
        layer, (A, B) = DynamicLoraLinear(6, 4), adapters(2)
        index = torch.tensor([1, 0, 1])
        padded = layer(X, A, B, adapter_index=index)
        torch.testing.assert_close(padded, layer(X, A[index], B[index]))
        bounds = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
        packed = layer(X.flatten(0, 1), A, B, adapter_index=index, cu_seqlens=bounds)
        torch.testing.assert_close(packed, padded.flatten(0, 1))

    def test_dropout_only_in_training_and_only_before_the_adapter(self):
        layer, (A, B) = DynamicLoraLinear(6, 4, dropout=0.5), adapters()
        kept = layer.eval()(X, A, B)
        assert torch.equal(kept, layer(X, A, B))
        layer.train()
        torch.manual_seed(0)
        dropped = layer(X, A, B)
        assert not torch.allclose(dropped, kept)
        torch.manual_seed(0)
        want = ctxkern.lora_linear(X, layer.weight, A, B, 1.0, layer.bias, dropout=0.5)
        assert torch.equal(dropped, want)
        assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias))

    def test_gradients_reach_what_makes_the_adapters(self):
        layer = DynamicLoraLinear(6, 4)
        maker = nn.Linear(2, 2 * 6 + 4 * 2)
        made = maker(torch.randn(3, 2))
        layer(X, made[:, :12].view(3, 2, 6), made[:, 12:].view(3, 4, 2)).sum().backward()
        assert maker.weight.grad.abs().sum() > 0
        assert layer.weight.grad.abs().sum() > 0


class TestExplain:
    def test_counts_of_base_and_update(self):
        shapes = (4, 32, 64), (48, 64), (4, 8, 64), (4, 48, 8)
        tensors = [torch.empty(shape, device="meta") for shape in shapes]
        state = torch.get_rng_state()
        plan = ctxkern.explain_lora(*tensors, dropout=0.1)
        assert torch.equal(torch.get_rng_state(), state)
        assert plan.linear_flops == 2 * 128 * 64 * 48
        assert plan.flops == plan.linear_flops + 2 * 128 * 8 * (64 + 48)
        assert plan.bytes == 4 * (128 * 64 + 64 * 48 + 4 * 8 * (64 + 48) + 3 * 128 * 48)
        back = ctxkern.explain_lora(*tensors, backward=True)
        assert back.flops == plan.linear_flops + 2 * 128 * 8 * (3 * 64 + 2 * 48)
        tensors[2].requires_grad_()
        only_a = ctxkern.explain_lora(*tensors, backward=True)
        assert (only_a.linear_flops, only_a.flops) == (0, 2 * 128 * 8 * (64 + 48))

    @pytest.mark.parametrize("backend", [None, "portable", "cpu"])
    def test_says_what_computes_the_base(self, backend):
        arguments, _ = lora_arguments(Case("rows", 3, 40, 5, 6, 1), 3)
        plan = ctxkern.explain_lora(**arguments, backend=backend)
        assert plan.backend == (backend or "cpu")
        assert plan.base == "torch's product in float32"
        assert plan.base in str(plan)
        with force(library=False):
            own = ctxkern.explain_lora(**arguments, backend=backend)
            back = ctxkern.explain_lora(**arguments, backend=backend, backward=True)
            dropped = ctxkern.explain_lora(**arguments, backend=backend, dropout=0.1)
        if backend == "portable":
            assert {own.base, back.base, dropped.base} == {plan.base}
        else:
            assert own.base == back.base == "a product of C++ in float32, with the update"
            assert dropped.base == "a product of C++ in float32"
        assert ctxkern.explain_lora(**(arguments | {"weight": None})).base == "none"
        half = arguments | {"weight": arguments["weight"].bfloat16()}
        assert "weight cast from bfloat16 in 1 strip" in ctxkern.explain_lora(**half).base

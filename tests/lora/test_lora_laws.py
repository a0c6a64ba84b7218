"""Laws of lora_linear that hold whatever the shapes, on the compiled kernels and in PyTorch."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.drawn import bounded, cases
from hypothesis import given
from hypothesis import strategies as st

import ctxkern
from ctxkern.reference import lora_linear_ref
from ctxkern.testing.families import lora_arguments
from ctxkern.testing.oracle import assert_matches, check_family, differentiate, is_floating

backends = pytest.mark.parametrize("backend", [name for name in ("cpu", "portable") if ctxkern.backends()[name]])
drawn = cases(per_token=False)
ranks = st.integers(0, 20)
seeds = st.integers(0, 1 << 16)


@backends
@bounded
@given(drawn, ranks, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_matches_the_oracle(backend, case, rank, seed, dtype, data):
    arguments, dout = lora_arguments(case, rank, dtype, seed=seed)
    count = len(arguments["A"])
    if arguments["adapter_index"] is not None:
        index = data.draw(st.lists(st.integers(-1, count - 1), min_size=case.B, max_size=case.B))
        arguments["adapter_index"] = torch.tensor(index, dtype=torch.int64)
    if data.draw(st.booleans()):
        each = data.draw(st.lists(st.integers(0, rank), min_size=count, max_size=count))
        arguments["ranks"] = torch.tensor(each, dtype=torch.int64)
    if data.draw(st.booleans()):
        arguments |= {"dropout": data.draw(st.sampled_from([0.1, 0.5, 0.9])), "seed": seed}
    check_family(partial(ctxkern.lora_linear, backend=backend), lora_linear_ref, arguments, dout)


@backends
@bounded
@given(drawn, ranks, seeds)
def test_without_an_adapter_it_is_the_linear_layer(backend, case, rank, seed):
    arguments, _ = lora_arguments(dataclasses.replace(case, weight=True), rank, seed=seed)
    arguments["adapter_index"] = torch.full((case.B,), -1)
    y = ctxkern.lora_linear(**arguments, backend=backend)
    assert torch.equal(y, F.linear(arguments["x"], arguments["weight"], arguments["bias"]))


@backends
@bounded
@given(drawn, ranks, st.integers(0, 20), seeds)
def test_a_rank_is_the_adapter_cut_short(backend, case, rank, less, seed):
    arguments, dout = lora_arguments(case, rank, seed=seed)
    cut, fn = max(rank - less, 0), partial(ctxkern.lora_linear, backend=backend)
    named = differentiate(fn, arguments | {"ranks": torch.full((len(arguments["A"]),), cut)}, dout)
    short = {"A": arguments["A"][:, :cut], "B": arguments["B"][:, :, :cut]}
    want = differentiate(fn, arguments | short, dout)
    torch.testing.assert_close(named["y"], want["y"])
    torch.testing.assert_close(named["dx"], want["dx"])
    torch.testing.assert_close(named["dA"][:, :cut], want["dA"])
    torch.testing.assert_close(named["dB"][:, :, :cut], want["dB"])
    assert not named["dA"][:, cut:].any()
    assert not named["dB"][:, :, cut:].any()


@backends
@bounded
@given(cases(per_token=False, packed=False, indexed=True), ranks, seeds, st.randoms())
def test_sequences_in_another_order(backend, case, rank, seed, draw):
    arguments, dout = lora_arguments(case, rank, torch.float64 if backend == "portable" else torch.float32, seed=seed)
    order = list(range(case.B))
    draw.shuffle(order)
    fn = partial(ctxkern.lora_linear, backend=backend)
    moved = arguments | {"x": arguments["x"][order], "adapter_index": arguments["adapter_index"][order]}
    second = differentiate(fn, moved, dout[order])
    back = torch.tensor(order, dtype=torch.int64).argsort()
    got = second | {name: second[name][back] for name in ("y", "dx")}
    double = {n: t.double() if is_floating(t) else t for n, t in arguments.items()}
    exact = differentiate(lora_linear_ref, double, dout)
    assert_matches(got, exact, differentiate(lora_linear_ref, arguments, dout), f"order {order}")

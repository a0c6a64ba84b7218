"""The specification itself: each family against loops over its definition, its derivatives by finite differences."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import ctxkern
from ctxkern import reference
from ctxkern.testing.cases import Case
from ctxkern.testing.families import (
    by_projection,
    factored_arguments,
    lora_arguments,
    modulated_arguments,
    qkv_arguments,
)
from ctxkern.testing.oracle import assert_matches, is_floating

CASES = [
    Case("padded", 2, 2, 3, 4, 2, bias=True),
    Case("no-weight", 2, 2, 3, 2, 3, weight=False),
    Case("shared", 4, 1, 3, 2, 2, rows=3, index=(2, 0, 2, 0), bias=True),
    Case("table-larger-than-batch", 2, 2, 2, 3, 2, rows=5, index=(4, 4)),
    Case("packed", 5, 0, 3, 2, 2, lengths=(0, 2, 0, 3, 0), bias=True),
    Case("packed-shared", 4, 0, 2, 3, 2, rows=3, index=(1, 2, 1, 0), lengths=(2, 1, 1, 0)),
    Case("packed-no-weight", 3, 0, 2, 2, 2, lengths=(1, 0, 2), weight=False),
    Case("one-packed", 1, 0, 2, 2, 1, lengths=(3,)),
]
PER_TOKEN = [
    Case("per-token", 2, 3, 3, 2, 2, per_token=True, bias=True),
    Case("per-token-no-weight", 1, 3, 2, 3, 2, per_token=True, weight=False),
]
every_case = pytest.mark.parametrize("case", CASES + PER_TOKEN, ids=lambda c: c.id)
table_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def token_rows(x, table, index, cu_seqlens):
    """The row of `table` [F, K], or of a table per token [B, S, K], of every token."""
    if table.dim() == 3:
        return list(table.flatten(0, 1))
    if cu_seqlens is None:
        owners = [b for b in range(x.shape[0]) for _ in range(x.shape[1])]
    else:
        owners = [b for b, (lo, hi) in enumerate(pairwise(cu_seqlens.tolist())) for _ in range(lo, hi)]
    return [table[b if index is None else index[b]] for b in owners]


def loop_modulated(x, context, weight, bilinear, bias, context_index, cu_seqlens):
    y = x.new_zeros(*x.shape[:-1], bilinear.shape[1])
    rows = token_rows(x, context, context_index, cu_seqlens)
    for out, token, c in zip(y.view(-1, y.shape[-1]), x.flatten(0, -2), rows, strict=True):
        for e in range(len(out)):
            for d in range(len(token)):
                w = 0 if weight is None else weight[d, e]
                for k in range(len(c)):
                    w = w + bilinear[d, e, k] * c[k]
                out[e] += token[d] * w
            if bias is not None:
                out[e] += bias[e]
    return y


def loop_lora(x, weight, A, B, scale, bias, adapter_index, cu_seqlens):
    y = x.new_zeros(*x.shape[:-1], B.shape[1])
    numbers = torch.arange(len(A))[:, None]
    rows = token_rows(x, numbers, adapter_index, cu_seqlens)
    for out, token, u in zip(y.view(-1, y.shape[-1]), x.flatten(0, -2), rows, strict=True):
        a, b = A[u.item()], B[u.item()]
        for e in range(len(out)):
            for d in range(len(token)):
                w = 0 if weight is None else weight[e, d]
                for r in range(len(a)):
                    w = w + scale * b[e, r] * a[r, d]
                out[e] += token[d] * w
            if bias is not None:
                out[e] += bias[e]
    return y


def loop_factored(x, context, weight, bias, context_index, cu_seqlens, in_factor, context_factor, out_factor):
    D, E, K = len(in_factor), out_factor.shape[1], len(context_factor)
    bilinear = x.new_zeros(D, E, K)
    for d in range(D):
        for e in range(E):
            for k in range(K):
                bilinear[d, e, k] = sum(in_factor[d] * out_factor[:, e] * context_factor[k])
    return loop_modulated(x, context, weight, bilinear, bias, context_index, cu_seqlens)


def assert_same(got, want):
    """Within the rounding of float64: the loops add up in another order."""
    got, want = ((t,) if isinstance(t, torch.Tensor) else t for t in (got, want))
    got, want = (dict(enumerate(ts)) for ts in (got, want))
    assert_matches(got, want, want)


@every_case
def test_modulated_is_its_definition(case):
    arguments, _ = modulated_arguments(case, torch.float64)
    assert_same(reference.modulated_linear_ref(**arguments), loop_modulated(**arguments))


@every_case
def test_qkv_is_three_projections(case):
    arguments, _ = qkv_arguments(case, torch.float64, widths=(3, 2, 1))
    shared = {n: arguments[n] for n in ("x", "context", "context_index", "cu_seqlens")}
    outs = by_projection(reference.modulated_qkv_ref)(**arguments)
    for i, y in enumerate(outs):
        each = {n: arguments[f"{n}{i}"] for n in ("weight", "bilinear", "bias")}
        assert_same(y, loop_modulated(**shared, **each))


def test_qkv_without_weights_and_biases():
    arguments, _ = qkv_arguments(CASES[0], torch.float64)
    bilinears = [arguments[f"bilinear{i}"] for i in range(3)]
    outs = reference.modulated_qkv_ref(arguments["x"], arguments["context"], None, bilinears)
    for y, bilinear in zip(outs, bilinears, strict=True):
        assert_same(y, loop_modulated(arguments["x"], arguments["context"], None, bilinear, None, None, None))


@table_case
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_lora_is_its_definition(case, rank):
    arguments, _ = lora_arguments(case, rank, torch.float64, scale=0.7)
    assert_same(reference.lora_linear_ref(**arguments), loop_lora(**arguments))


@every_case
def test_factored_is_its_definition(case):
    arguments, _ = factored_arguments(case, 3, torch.float64)
    assert_same(reference.factored_modulated_linear_ref(**arguments), loop_factored(**arguments))


def check_derivatives(fn, arguments, second=True):
    """gradcheck and, in its fast mode, gradgradcheck in every floating argument at once."""
    names = [n for n, t in arguments.items() if is_floating(t)]
    leaves = [arguments[n].detach().requires_grad_() for n in names]

    def positional(*tensors):
        return fn(**(arguments | dict(zip(names, tensors, strict=True))))

    assert gradcheck(positional, leaves)
    if second:
        assert gradgradcheck(positional, leaves, fast_mode=True)


def least_workspace(*args, **kwargs):
    return ctxkern.modulated_linear(*args, workspace_bytes=1, **kwargs)


def named_reference(*args, **kwargs):
    return ctxkern.modulated_linear(*args, backend="reference", **kwargs)


@every_case
@pytest.mark.parametrize(
    "fn", [reference.modulated_linear_ref, ctxkern.modulated_linear, least_workspace, named_reference]
)
def test_derivatives_of_modulated(case, fn):
    check_derivatives(fn, modulated_arguments(case, torch.float64)[0])


@every_case
@pytest.mark.parametrize("fn", [reference.modulated_qkv_ref, ctxkern.modulated_qkv])
def test_derivatives_of_qkv(case, fn):
    check_derivatives(by_projection(fn), qkv_arguments(case, torch.float64, widths=(2, 1, 1))[0])


@table_case
@pytest.mark.parametrize("fn", [reference.lora_linear_ref, ctxkern.lora_linear])
def test_derivatives_of_lora(case, fn):
    check_derivatives(fn, lora_arguments(case, 2, torch.float64)[0])


@every_case
@pytest.mark.parametrize("fn", [reference.factored_modulated_linear_ref, ctxkern.factored_modulated_linear])
def test_derivatives_of_factored(case, fn):
    check_derivatives(fn, factored_arguments(case, 2, torch.float64)[0])


@pytest.mark.parametrize("lead", [(3,), (2, 2), ()], ids=str)
def test_derivatives_of_bilinear(lead):
    def made(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(0)
    arguments = {"input1": made(*lead, 3), "input2": made(*lead, 2), "weight": made(4, 3, 2), "bias": made(4)}
    check_derivatives(ctxkern.bilinear, arguments)


@pytest.mark.parametrize("needed", ["x", "context", "weight", "bilinear", "bias"])
def test_second_derivatives_of_one_tensor_alone(needed):
    arguments, dout = modulated_arguments(CASES[2], torch.float64)
    leaf = arguments[needed].requires_grad_()
    assert gradgradcheck(lambda t: ctxkern.modulated_linear(**(arguments | {needed: t})), (leaf,), (dout,))

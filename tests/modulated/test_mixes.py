"""Every mix of dtypes that the contract allows: a half next to float32 in either place, each operand in its own."""

import itertools

import pytest
import torch

import ctxkern
from ctxkern.dtypes import KERNEL_FLOATS, mixes, name_of
from ctxkern.reference import lora_linear_ref, modulated_linear_ref
from ctxkern.registry import interpreted
from ctxkern.testing import force
from ctxkern.testing.oracle import assert_matches

BACKENDS = [name for name, status in ctxkern.backends().items() if status and name != "reference"]
# panel, few rows per context, weights beyond what is made whole
SIZES = {"panel": (4, 8, 32, 24, 6), "few-rows": (6, 1, 16, 16, 5), "many": (20, 4, 64, 64, 16)}


def results(fn, arguments, dout):
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = fn(*leaves)
    grads = torch.autograd.grad(y, leaves, dout.to(y.dtype))
    return {"y": y.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def assert_right(fn, ref, arguments, dout):
    dout = dout.to(arguments[0].dtype)
    got, einsum = results(fn, arguments, dout), results(ref, arguments, dout)
    exact = results(ref, [t.double() for t in arguments], dout.double())
    for value, like in zip(got.values(), [arguments[0], *arguments], strict=True):
        assert value.dtype is like.dtype
    assert_matches(got, exact, einsum, str([name_of(t.dtype) for t in arguments]))


def parameter_dtypes(dtype, operands):
    return itertools.product([d for d in KERNEL_FLOATS if mixes(d, dtype)], repeat=operands)


@pytest.mark.parametrize("strategy", ["panel", "outer"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", KERNEL_FLOATS, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modulated(backend, dtype, sizes, strategy):
    if backend == "triton" and interpreted():
        if sizes is not SIZES["panel"]:
            pytest.skip("one size in Triton's interpreter")
        if dtype is torch.bfloat16:
            pytest.skip("bfloat16 products are wrong in Triton's interpreter")
    B, S, D, E, K = sizes
    torch.manual_seed(0)
    made = torch.randn(B, S, D), torch.randn(B, K), torch.randn(D, E) / D**0.5, torch.randn(D, E, K) / (D * K) ** 0.5
    made, dout = (*made, torch.randn(E)), torch.randn(B, S, E)
    for dtypes in parameter_dtypes(dtype, 4):
        if sizes is not SIZES["panel"] and len(set(dtypes)) > 1:
            continue
        # seconds each in the interpreter: none, one or all of another dtype
        if (
            backend == "triton"
            and interpreted()
            and (torch.bfloat16 in dtypes or dtypes.count(dtype) not in (0, len(dtypes) - 1, len(dtypes)))
        ):
            continue
        arguments = [t.to(d) for t, d in zip(made, (dtype, *dtypes), strict=True)]
        with force(strategy=strategy):
            assert_right(
                lambda *a: ctxkern.modulated_linear(*a, backend=backend), modulated_linear_ref, arguments, dout
            )


@pytest.mark.parametrize("dtype", KERNEL_FLOATS, ids=name_of)
def test_lora(dtype):
    torch.manual_seed(0)
    made = torch.randn(4, 8, 32), torch.randn(24, 32) / 32**0.5, torch.randn(4, 6, 32) / 32**0.5, torch.randn(4, 24, 6)
    dout = torch.randn(4, 8, 24)
    for dtypes in parameter_dtypes(dtype, 3):
        arguments = [t.to(d) for t, d in zip(made, (dtype, *dtypes), strict=True)]
        assert_right(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=name_of)
def test_a_half_model_runs_under_autocast_of_the_other_half_as_the_einsum_does(half):
    made = torch.randn(4, 8, 32), torch.randn(4, 6), torch.randn(32, 24), torch.randn(32, 24, 6)
    made = [t.to(half) for t in made]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ctxkern.modulated_linear(*made)
        want = modulated_linear_ref(*made)
    assert y.dtype is want.dtype is torch.bfloat16
    exact = modulated_linear_ref(*(t.double() for t in made))
    assert_matches({"y": y}, {"y": exact}, {"y": want})


def test_bilinear_under_autocast_has_the_dtype_of_torchs():
    made = torch.randn(7, 5), torch.randn(7, 4), torch.randn(6, 5, 4), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = ctxkern.bilinear(*made), torch.nn.functional.bilinear(*made)
    exact = torch.nn.functional.bilinear(*(t.double() for t in made))
    assert_matches({"y": y}, {"y": exact}, {"y": want})
    assert torch.equal(y, ctxkern.bilinear(*made))

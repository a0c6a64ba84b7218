"""What the Triton kernels do with numbers: the range of float16, long sums, parameters of other dtypes than x."""

import functools
import importlib

import pytest
import torch

import ctxkern
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.registry import interpreted
from ctxkern.testing import force
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.oracle import assert_matches, baseline, check, oracle, run

pytest.importorskip("triton")
if not ctxkern.backends()["triton"]:
    pytest.skip(str(ctxkern.backends()["triton"]), allow_module_level=True)

DEVICE = "cpu" if interpreted() else "cuda"
F16, F32 = torch.float16, torch.float32
triton_linear = functools.partial(ctxkern.modulated_linear, backend="triton")


@pytest.fixture(params=["panel", "outer"], autouse=True)
def form(request):
    with force(strategy=request.param):
        yield request.param


def test_products_of_large_float16_stay_finite():
    inputs = make_inputs(Case("large", 8, 1, 32, 24, 16), F16, device=DEVICE)
    inputs.weight *= 1e-3
    inputs.bilinear *= 1e-3
    inputs.x[:, :, 3] = 6000.0
    inputs.context[:, 5] = 12.0
    positional, keyword = inputs.arguments()
    y = triton_linear(*positional, **keyword)
    assert_matches({"y": y}, {"y": oracle(inputs)["y"]}, {"y": baseline(inputs)["y"]})


def test_products_of_large_gradients_stay_finite(form):
    if form == "panel":
        pytest.skip("the gradient of a context's weight is itself beyond float16, as it is in the einsum")
    inputs = make_inputs(Case("large", 8, 1, 32, 24, 16), F16, device=DEVICE)
    inputs.x[:, :, 3] = 6000.0
    inputs.dy *= 20
    inputs.context *= 0.01
    got, exact = run(triton_linear, inputs)["dbilinear"], oracle(inputs)["dbilinear"]
    assert exact.abs().max() < torch.finfo(F16).max
    assert (got.double() - exact).norm() <= 2 * torch.finfo(F16).eps * exact.norm()


@pytest.mark.parametrize("scale", [1e-2, 1e-4], ids=str)
def test_products_of_small_float16_keep_their_bits(scale):
    inputs = make_inputs(Case("small", 4, 2, 32, 24, 16), F16, device=DEVICE)
    inputs.x *= scale
    inputs.dy *= scale
    inputs.context[:, 5] = 12.0
    check(triton_linear, inputs)


@pytest.mark.parametrize("factor", [1e-3, 1e-6], ids=str)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
def test_small_float32_parameters_next_to_float16(weight, factor):
    inputs = make_inputs(Case("tiny", 4, 24, 32, 32, 16, weight=weight), F16, F32, device=DEVICE)
    inputs.bilinear *= factor
    check(triton_linear, inputs)


def test_a_float32_sum_over_many_rows_is_no_single_chain(form):
    if form == "panel":
        pytest.skip("sums over D alone, as the einsum")
    d_in, small = 256, 2.0**-25  # what 1 + small rounds to is 1
    x = torch.full((2, 1, d_in), small, device=DEVICE)
    x[..., 0] = 1
    y = triton_linear(
        x, torch.ones(2, 1, device=DEVICE), None, torch.ones(d_in, 16, 1, device=DEVICE), workspace_bytes=1
    )
    assert (y.double() - (1 + small * (d_in - 1))).abs().max() <= 4 * torch.finfo(F32).eps


# dtypes of x, context, weight, bilinear, bias
MIXES = {
    "float32 table": (F16, F32, F16, F16, F16),
    "half parameters": (F32, F16, F16, F16, F16),
    "half bilinear": (F32, F32, F32, F16, F32),
    "float32 weight": (F16, F16, F32, F16, F32),
    "float32 bilinear": (F16, F16, F16, F32, F16),
}
CASES = [
    Case("shared", 8, 5, 18, 14, 6, rows=4, index=(3, 0, 3, 1, 3, 0, 1, 3), bias=True),
    Case("wide-k", 3, 10, 12, 8, 130),
    Case("per-token", 3, 7, 12, 10, 6, per_token=True, bias=True),
]


def _without_checks(backend, inputs):
    """As `run`: the backend itself, whose callers may refuse a mix."""
    x, context, weight, bilinear, bias = inputs.arguments()[0]
    operands = Operands(x, context, [weight], [bilinear], [bias], inputs.context_index, inputs.cu_seqlens)
    (y,) = backend.forward(operands, 1 << 20)
    needs = Gradients(True, True, [weight is not None], [True], [bias is not None])
    dx, dcontext, *parameters = backend.backward([inputs.dy], operands, 1 << 20, needs).flat()
    found = {"y": y, "dx": dx, "dcontext": dcontext} | dict(
        zip(("dweight", "dbilinear", "dbias"), parameters, strict=True)
    )
    if bias is not None:
        found["dbias"] = found["dbias"].to(bias.dtype)
    return {name: t for name, t in found.items() if t is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("mix", MIXES)
def test_each_parameter_has_a_dtype(mix, case, form):
    if case.per_token and form == "panel":
        pytest.skip("a context per token always takes the outer form")
    inputs = make_inputs(case, F32, device=DEVICE)
    for name, dtype in zip((*inputs.PARAMETERS, "dy"), (*MIXES[mix], MIXES[mix][0]), strict=True):
        t = getattr(inputs, name)
        setattr(inputs, name, None if t is None else t.to(dtype))
    backend = importlib.import_module("ctxkern.modulated.triton")
    assert_matches(_without_checks(backend, inputs), oracle(inputs), baseline(inputs), case.id)

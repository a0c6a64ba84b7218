"""The panel form with the library's products: right, within its memory, as the plan says."""

import functools
import importlib

import pytest
import torch

import ctxkern
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.modulated.plan import by_library
from ctxkern.plan import DEFAULT_WORKSPACE, GPU_WORKSPACE, default_workspace
from ctxkern.reference import modulated_qkv_ref
from ctxkern.registry import interpreted
from ctxkern.testing import force
from ctxkern.testing.cases import DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.measure import peak_extra_bytes
from ctxkern.testing.oracle import assert_matches, baseline, check, check_family, oracle, run

pytest.importorskip("triton")
if not ctxkern.backends()["triton"]:
    pytest.skip(str(ctxkern.backends()["triton"]), allow_module_level=True)

from ctxkern.runtime.triton import launches

DEVICE = "cpu" if interpreted() else "cuda"
if interpreted():
    DTYPES = {name: pair for name, pair in DTYPES.items() if pair[0] is not torch.bfloat16}
triton_linear = functools.partial(ctxkern.modulated_linear, backend="triton")
BIASED = Case("biased", 3, 20, 12, 20, 5, bias=True)


@pytest.fixture
def products(monkeypatch):
    """Names of the library's products, as they are made."""
    made = []
    for name in ("bmm", "baddbmm"):
        function = getattr(launches, name)

        def noted(*args, name=name, function=function, **options):
            made.append(name)
            return function(*args, **options)

        monkeypatch.setattr(launches, name, noted)
    return made


@pytest.fixture
def library(products):
    with force(strategy="panel", library=True):
        yield products


CASES = [
    (BIASED, None),
    (Case("no-weight", 2, 7, 9, 11, 3, weight=False), None),
    (Case("wide-k", 2, 10, 12, 8, 130), None),
    (Case("strided", 2, 9, 8, 10, 4, x_layout="strided", bilinear_layout="permuted"), None),
    (Case("strips", 2, 6, 3, 140, 4, bias=True), 1536),
    (Case("groups", 4, 3, 8, 20, 5, bias=True), 1536),
    (Case("least", 2, 3, 3, 4, 2, bias=True), 1),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("case", "workspace"), CASES, ids=[case.id for case, _ in CASES])
def test_against_the_oracle(library, case, workspace, dtypes):
    fn = functools.partial(triton_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, *DTYPES[dtypes], device=DEVICE), case.id)
    assert "bmm" in library


@pytest.mark.parametrize(("workspace", "dtype"), [(None, torch.float16), (None, torch.float32), (1024, torch.float32)])
def test_three_projections(library, workspace, dtype):
    case = Case("qkv", 2, 5, 6, 20, 4, bias=True)
    arguments, douts = qkv_arguments(case, dtype, widths=(10, 5, 17))
    arguments = {name: t if t is None else t.to(DEVICE) for name, t in arguments.items()}
    fn = by_projection(functools.partial(ctxkern.modulated_qkv, backend="triton", workspace_bytes=workspace))
    check_family(fn, by_projection(modulated_qkv_ref), arguments, [dout.to(DEVICE) for dout in douts], "qkv")
    assert "baddbmm" in library or workspace


@pytest.mark.parametrize("needed", ["x", "context", "weight", "bilinear", "bias"])
@pytest.mark.usefixtures("library")
def test_one_gradient_alone(needed):
    inputs = make_inputs(BIASED, device=DEVICE)
    want = run(triton_linear, inputs)[f"d{needed}"]
    leaf = getattr(inputs, needed).requires_grad_()
    positional, keyword = inputs.arguments()
    (got,) = torch.autograd.grad(triton_linear(*positional, **keyword), leaf, inputs.dy)
    assert torch.equal(got, want)


@pytest.mark.usefixtures("library")
def test_under_autocast():
    inputs = make_inputs(BIASED, device=DEVICE)
    positional, keyword = inputs.arguments()
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = triton_linear(*positional, **keyword)
    assert y.dtype is torch.float16
    rounded = baseline(inputs.map(torch.Tensor.half))
    assert_matches({"y": y}, {"y": oracle(inputs)["y"]}, {"y": rounded["y"]})


@pytest.mark.parametrize(
    "case",
    [
        Case("indexed", 3, 8, 6, 7, 3, rows=4, index=(2, 0, 2)),
        Case("packed", 3, 0, 6, 7, 3, lengths=(8, 8, 8)),
        Case("per-token", 2, 3, 6, 7, 3, per_token=True),
    ],
    ids=lambda case: case.id,
)
def test_ragged_rows_keep_our_kernels(library, case):
    check(triton_linear, make_inputs(case, device=DEVICE), case.id)
    assert library == []


def test_wrong_rows_would_be_noticed(library, monkeypatch):
    of = launches.View.of

    def shifted(self, values):
        t = of(self, values)
        return t.roll(1, 0) if t.dim() == 3 and self.shape[1:] == (20, 12) else t

    monkeypatch.setattr(launches.View, "of", shifted)
    with pytest.raises(AssertionError, match="y: rms error"):
        check(triton_linear, make_inputs(BIASED, device=DEVICE))


@pytest.mark.parametrize("workspace", [1 << 12, 1 << 14])
@pytest.mark.usefixtures("library")
def test_temporaries_stay_within_the_workspace(workspace):
    case = Case("wide", 3, 16, 12, 48, 8)
    made = make_inputs(case, torch.float32, device=DEVICE)
    operands = Operands(made.x, made.context, [made.weight], [made.bilinear], [None])
    backend = importlib.import_module("ctxkern.modulated.triton")
    needs = Gradients(True, True, [True], [True], [False])
    # y, or gradients of x and of the parameters, which are results
    results = case.tokens * case.E * 4, 4 * (case.tokens * case.D + case.D * case.E * (case.K + 1) + case.B * case.K)
    calls = (
        lambda: backend.forward(operands, workspace),
        lambda: backend.backward([made.dy], operands, workspace, needs),
    )
    for call, own in zip(calls, results, strict=True):
        assert peak_extra_bytes(call) <= workspace + own + 1024


def _plan(case, dtype=torch.bfloat16, backward=False, **more):
    made = make_inputs(case, dtype, device="meta")
    operands = Operands(made.x, made.context, [made.weight], [made.bilinear], [made.bias], made.context_index)
    return importlib.import_module("ctxkern.modulated.triton").plan(operands, GPU_WORKSPACE, backward)


PRICE = Case("price", 16, 2048, 2048, 2048, 32)


@pytest.mark.parametrize("backward", [False, True])
def test_the_plan_says_which_products_are_made(backward):
    plan = _plan(PRICE, backward=backward)
    assert plan.library
    assert "products by the library" in str(plan)
    with force(library=False):
        own = _plan(PRICE, backward=backward)
    assert not own.library
    assert own.predicted_seconds > plan.predicted_seconds
    indexed = Case("indexed", 16, 2048, 2048, 2048, 32, rows=16, index=tuple(range(16)))
    assert not _plan(indexed, backward=backward).library


def test_few_rows_keep_our_kernels():
    assert not _plan(Case("few", 64, 8, 2048, 2048, 32)).library
    assert not _plan(Case("decode", 64, 1, 2048, 2048, 32)).library


@pytest.mark.skipif(not interpreted(), reason="many sizes")
@pytest.mark.parametrize("rows", [8, 300])
def test_what_runs_is_what_the_plan_says(products, rows):
    inputs = make_inputs(Case("rows", 2, rows, 64, 64, 4), device=DEVICE)
    positional, keyword = inputs.arguments()
    with force(strategy="panel"):
        triton_linear(*positional, **keyword)
        assert ctxkern.explain(*positional, backend="triton", **keyword).library == (products == ["bmm"])
    assert (products == ["bmm"]) == (rows == 300)


def test_the_rule():
    assert by_library(True, lambda: True)
    assert not by_library(True, lambda: False)
    assert not by_library(False, lambda: True)
    with force(library=True):
        assert by_library(True, lambda: False)
        assert not by_library(False, lambda: False)
    with force(library=False):
        assert not by_library(True, lambda: True)


def test_a_gpu_has_a_larger_workspace():
    assert (default_workspace("cpu"), default_workspace("cuda")) == (DEFAULT_WORKSPACE, GPU_WORKSPACE)

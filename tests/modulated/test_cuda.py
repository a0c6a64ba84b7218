"""The CUDA C++ kernels, compiled for the CPU by an emulation header: case table, bounds, barriers, thread orders."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.emulated import compiled, emulated, forget, planted, without_dtype
from helpers.native import MIXES, UNREAD, UNREAD_CODE, direct, mix_id, mixed

import ctxkern
from ctxkern.reference import modulated_qkv_ref
from ctxkern.runtime import cuda as cuda_runtime
from ctxkern.testing.cases import CASES, DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.force import STRATEGIES, force
from ctxkern.testing.measure import peak_extra_bytes
from ctxkern.testing.oracle import check, check_family, oracle, run

FORMS = STRATEGIES
# the emulation needs seconds for each of these, and longer in many strips
LARGE = ("deep", "non-power-of-two", "debug", "prime", "narrow-k")

cuda_linear = functools.partial(ctxkern.modulated_linear, backend="cuda")


@pytest.fixture(scope="module", autouse=True)
def library():
    with emulated() as path:
        yield path


@pytest.fixture
def form(request):
    with force(strategy=request.param):
        yield request.param


def _table():
    for name in FORMS:
        for dtypes in DTYPES:
            for case in CASES:
                if name == "panel" and case.per_token or case.id in LARGE and dtypes not in ("f32", "bf16"):
                    continue
                marks = [pytest.mark.slow] if case.id in LARGE and dtypes == "bf16" else []
                yield pytest.param(name, dtypes, case, id=f"{case.id}-{dtypes}-{name}", marks=marks)


@pytest.mark.parametrize(("form", "dtypes", "case"), list(_table()), indirect=["form"])
def test_table(form, dtypes, case):
    check(cuda_linear, make_inputs(case, *DTYPES[dtypes]), case.id)


# contexts in several groups, strips of a few columns and rows, blocks of a part of E; K over several blocks
SMALL = [
    (Case("groups", 10, 3, 12, 20, 5, bias=True), 2048),
    (Case("groups-wide-k", 5, 4, 6, 10, 140), 1024),
    (Case("blocks-of-e", 3, 5, 9, 150, 4), 4096),
    (Case("least", 3, 4, 5, 6, 3, bias=True), 1),
    (Case("shared-groups", 9, 4, 12, 20, 6, rows=4, index=(3, 1, 3, 0, 0, 2, 3, 1, 1)), 2048),
    (Case("many-sequences", 300, 1, 6, 7, 3, rows=11, index=tuple(i * i % 11 for i in range(300))), 1 << 14),
    (Case("many-lengths", 150, 0, 6, 7, 3, lengths=tuple(i % 3 for i in range(150))), 1 << 14),
    (Case("large-tiles", 2, 130, 64, 136, 9, bias=True), 1 << 20),
    (Case("parts-of-e", 2, 20, 4, 600, 5), 1 << 20),
    # whole stages of 32 and of 16 and what is left, of rows and columns that end within a tile
    (Case("large-plain", 2, 160, 120, 128, 32), 1 << 20),
    (Case("plain-shared", 4, 16, 32, 72, 32, rows=2, index=(1, 0, 1, 1), bias=True), 1 << 16),
]


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("case", "workspace"), SMALL, ids=[case.id for case, _ in SMALL])
def test_small_workspace(form, case, workspace, dtypes):
    if case.id.startswith("large") and form == "outer":
        pytest.skip("the outer form has no large tiles")
    fn = functools.partial(cuda_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, *DTYPES[dtypes]), case.id)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32-params"])
@pytest.mark.parametrize("lengths", [None, (3, 0, 5, 2)], ids=["padded", "packed"])
def test_three_projections_share_dx_and_dcontext(form, lengths, dtypes):
    case = Case("qkv", 4, 5, 12, 20, 48, rows=3, index=(2, 0, 2, 1), lengths=lengths, bias=True)
    fn = by_projection(functools.partial(ctxkern.modulated_qkv, backend="cuda"))
    arguments = qkv_arguments(case, *DTYPES[dtypes], widths=(20, 9, 33))
    check_family(fn, by_projection(modulated_qkv_ref), *arguments, "qkv")


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32-params"])
def test_no_order_of_threads_changes_a_bit(form, dtypes, monkeypatch):
    inputs = make_inputs(next(c for c in CASES if c.id == "shared-uneven"), *DTYPES[dtypes])
    first = run(cuda_linear, inputs)
    for seed in ("7", "8"):
        monkeypatch.setenv("CTXKERN_EMULATE_SEED", seed)
        for name, value in run(cuda_linear, inputs).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("needed", ["x", "context", "weight", "bilinear", "bias"])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_one_gradient_alone(form, needed):
    inputs = make_inputs(next(c for c in CASES if c.id == "tiny"))
    want = run(cuda_linear, inputs)[f"d{needed}"]
    leaf = getattr(inputs, needed).requires_grad_()
    positional, keyword = inputs.arguments()
    (got,) = torch.autograd.grad(cuda_linear(*positional, **keyword), leaf, inputs.dy)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_every_operand_has_its_own_dtype(form, mix):
    module = importlib.import_module("ctxkern.modulated.cuda")
    check(direct(module), mixed(make_inputs(Case("mixed", 3, 3, 10, 12, 9, bias=True)), mix))


def test_products_of_x_and_context_beyond_float16():
    """x c leaves the range of float16 while every weight and result is small."""
    inputs = make_inputs(Case("large-x", 8, 1, 32, 24, 16), torch.float16)
    inputs.x[:, :, 3], inputs.context[:, 5] = 6000.0, 12.0
    inputs.bilinear, inputs.weight, inputs.dy = inputs.bilinear * 0.02, inputs.weight * 0.02, inputs.dy * 0.02
    with force(strategy="outer"):
        check(cuda_linear, inputs)


@pytest.mark.parametrize(("x", "context"), [(1e-5, 12.0), (1e-5, 1e-3), (1000.0, 1e-4), (0.0, 1.0)])
def test_small_and_large_rows_of_float16(x, context):
    inputs = make_inputs(Case("scaled", 6, 1, 40, 32, 16), torch.float16)
    inputs.x, inputs.context = inputs.x * x, inputs.context * context
    with force(strategy="outer"):
        check(cuda_linear, inputs)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
@pytest.mark.parametrize("factor", [1e-2, 1e-4, 1e-6])
def test_small_parameters_next_to_float16(form, weight, factor):
    """Their rounded values and residuals are subnormal in float16."""
    case = Case("small-bilinear", 4, 12, 32, 32, 16, weight=weight)
    inputs = make_inputs(case, torch.float16, torch.float32)
    inputs.bilinear = inputs.bilinear * factor
    check(cuda_linear, inputs)


@pytest.mark.parametrize(
    "case", [Case("d256", 16, 2, 256, 24, 32), Case("d512", 8, 2, 512, 24, 64)], ids=lambda c: c.id
)
def test_long_sums_of_d_and_k(case):
    with force(strategy="outer"):
        check(cuda_linear, make_inputs(case))


def test_a_gradient_reads_nothing_that_it_does_not_need():
    """Of one operand alone, in a process that dies where it reads others."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ctxkern.__file__).parents[1])}
    code = UNREAD_CODE.format(backend="cuda", unread=UNREAD)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "read nothing else", (done.returncode, done.stderr[-2000:])


def test_a_library_of_another_layout_is_refused(tmp_path, monkeypatch):
    sources = planted(tmp_path, "problem.h", "int64_t d_in, context_dim;", "int64_t context_dim, d_in;")
    monkeypatch.setenv("CTXKERN_CUDA_LIBRARY", str(compiled(tmp_path, "-O0", sources=sources)))
    forget()
    reason = cuda_runtime.reason()
    monkeypatch.undo()
    forget()
    assert "it was built from other sources (Problem.d_in " in reason


def test_what_cannot_run_says_so():
    x, context, bilinear = torch.randn(2, 3, 4), torch.randn(5, 2), torch.randn(4, 6, 2)
    with pytest.raises(ValueError, match=r"context_index\[1\] is 5"):
        cuda_linear(x, context, None, bilinear, context_index=torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="float64"):
        cuda_linear(x.double(), context.double(), None, bilinear.double(), context_index=torch.tensor([0, 1]))


# each of the ways that torch has; the getter of the first raises after the others
TF32 = {
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "fp32_precision of a backend": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "fp32_precision of all": lambda: _tell_all(),
}


def _tell_all():
    # a backend that was told something itself does not follow
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("tell", TF32)
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_float32_is_rounded_to_tf32_where_torch_is_told_so(form, tell):
    inputs = make_inputs(Case("tf32", 2, 30, 24, 40, 12))
    exact, ieee = oracle(inputs), run(cuda_linear, inputs)
    every, matmul = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        TF32[tell]()
        rounded = run(cuda_linear, inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = every, matmul
    for name, value in rounded.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert (ieee[name].double() - exact[name]).norm() / exact[name].norm() < 1e-6, name
        # a product of two factors with 10 bits of fraction each, and of a weight made of such
        assert 1e-6 < error < 4 * 2**-11, (name, error)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32-params"])
def test_temporaries_stay_within_the_workspace(form, dtypes):
    case = Case("memory", 16, 8, 48, 48, 16, rows=9, index=tuple(i % 9 for i in range(16)))
    inputs = make_inputs(case, *DTYPES[dtypes])
    positional, keyword = inputs.arguments()
    leaves = [t.requires_grad_() for t in positional if t is not None]
    for workspace in (16 << 10, 256 << 10):
        fn = functools.partial(cuda_linear, *positional, **keyword, workspace_bytes=workspace)
        peak = max(peak_extra_bytes(fn), peak_extra_bytes(lambda fn=fn: torch.autograd.grad(fn(), leaves, inputs.dy)))
        # rows, their gradients and sums in float32; which rows belong together
        assert peak <= workspace + 3 * case.tokens * 48 * 4 + 4096, (peak, workspace)


def test_a_launch_that_fails_names_operator_shape_and_cause(monkeypatch):
    x, context, bilinear = torch.randn(2, 3, 4), torch.randn(2, 2), torch.randn(4, 6, 2)
    without_dtype(monkeypatch, importlib.import_module("ctxkern.modulated.cuda"))
    with pytest.raises(
        RuntimeError, match=r"modulated_forward on backend 'cuda' \(x \[2, 3, 4\].*failed: an unknown dtype"
    ):
        cuda_linear(x, context, None, bilinear)


def test_a_workspace_that_cannot_be_had_names_operator_shape_and_cause(monkeypatch):
    x, context, bilinear = torch.randn(2, 3, 4), torch.randn(2, 2), torch.randn(4, 6, 2)
    empty = torch.empty

    def full(*args, **how):
        if how.get("dtype") is torch.uint8:
            raise torch.OutOfMemoryError("no memory left")
        return empty(*args, **how)

    monkeypatch.setattr(torch, "empty", full)
    message = r"modulated_forward on backend 'cuda' \(x \[2, 3, 4\].*workspace of \d+ bytes: no memory left"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        cuda_linear(x, context, None, bilinear)


def test_explain_tells_form_and_blocks():
    x, context, bilinear = torch.randn(3, 64, 8), torch.randn(3, 4), torch.randn(8, 10, 4)
    plan = ctxkern.explain(x, context, None, bilinear, backend="cuda")
    assert (plan.strategy, plan.backend, plan.contexts, plan.strip, plan.group) == ("panel", "cuda", 3, 10, 3)
    assert ctxkern.explain(x[:, :2].contiguous(), context, None, bilinear, backend="cuda").strategy == "outer"
    assert ctxkern.explain(x, context, None, bilinear, backend="cuda", backward=True).strip_of == "D"


PLANTED = {
    "nothing": ("cuda/runtime/product.h", "constexpr int kStages = 3;", "constexpr int kStages = 3 + 0;"),
    "no barrier before a stage is read": (
        "cuda/runtime/product.h",
        "wait_copies<kStages - 2>();\n      __syncthreads();",
        "wait_copies<kStages - 2>();",
    ),
    "copies are not waited for": ("cuda/runtime/product.h", "wait_copies<kStages - 2>();", "wait_copies<kStages>();"),
    "zeros": (
        "cuda/modulated/panel.h",
        "a + bias[j][0], b + bias[j][1]",
        "0 * a + bias[j][0], b + bias[j][1]",
    ),
    "the neighbour's context": (
        "cuda/modulated/panel.h",
        "{q.context, q.context_dim, slots, block.u_begin + u0, count - u0, 0}",
        "{q.context, q.context_dim, slots, block.u_begin + u0 + 1, count - u0 - 1, 0}",
    ),
    "half the lanes leave": (
        "cuda/runtime/product.h",
        "      const int low = lane % 8,",
        "      if (lane >= 16) return;\n      const int low = lane % 8,",
    ),
    "a column too many is written": (
        "cuda/modulated/panel.h",
        "a + bias[j][0], b + bias[j][1], left - column);",
        "a + bias[j][0], b + bias[j][1], left - column + 1);",
    ),
    "a row too many is read": (
        "cuda/modulated/operands.h",
        "const int valid = row < rows ? columns - column : 0;\n    const int64_t line = row < rows ?",
        "const int valid = row < rows + 9999 ? columns - column : 0;\n    const int64_t line = row < rows + 9999 ?",
    ),
}
# what the sanitizer must see; the others may be noticed by their results
OUT_OF_BOUNDS = ("a column too many is written",)

_CHECK = """
import functools, torch, ctxkern
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.force import force
from ctxkern.testing.oracle import check

with force(strategy="panel"):
    for dtype in (torch.bfloat16, torch.float32):
        inputs = make_inputs(Case("planted", 2, 70, 40, 72, 24, bias=True), dtype)
        check(functools.partial(ctxkern.modulated_linear, backend="cuda"), inputs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_caught(name, tmp_path):
    sources = planted(tmp_path, *PLANTED[name])
    # with the sanitizer's own red zones around what torch and the emulation allocate
    library = compiled(tmp_path, "-g", "-fsanitize=address", "-Wno-clobbered", sources=sources)
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {
        **os.environ,
        "CTXKERN_CUDA_LIBRARY": str(library),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(Path(ctxkern.__file__).parents[1]),
    }
    done = subprocess.run(
        ["setarch", "-R", sys.executable, "-c", _CHECK], capture_output=True, text=True, env=environment, cwd="/"
    )
    if name == "nothing":
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0, "not noticed"
        assert name not in OUT_OF_BOUNDS or "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]

"""The C++ kernels: every instruction set of the machine, both strategies, threads, forks and memory layouts."""

import functools
import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.kinds import BY_ID
from helpers.native import MIXES, UNREAD, UNREAD_CODE, direct, mix_id, mixed
from hypothesis import given, settings
from hypothesis import strategies as st

import ctxkern
from ctxkern.modulated import cpu as cpu_backend
from ctxkern.modulated.operands import Operands
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.testing.cases import BENCH_CASES, CASES, DTYPES, Case, make_inputs
from ctxkern.testing.force import STRATEGIES, force
from ctxkern.testing.oracle import check, run

pytestmark = pytest.mark.skipif(not cpu_runtime.available(), reason=cpu_runtime.reason() or "available")

ISAS = cpu_runtime.cpu_isas() or []
# more contexts than a group of a small budget holds, more rows than a sum is cut to, more columns than a chunk
LARGER = [
    Case("many-contexts", 70, 5, 40, 72, 20, bias=True),
    Case("many-rows", 2, 300, 33, 40, 17),
    Case("many-columns", 3, 9, 36, 300, 8, bias=True),
    Case("many-columns-many-contexts", 40, 3, 34, 288, 33),
    Case("interleaved-runs", 12, 40, 32, 48, 16, rows=3, index=(0, 1, 2) * 4),
    Case("interleaved-short-runs", 12, 3, 32, 48, 16, rows=3, index=(2, 1, 0) * 4),
    Case("k-major", 4, 12, 20, 36, 24),
    # weights that contexts change nothing of, and rows that several threads lay out
    Case("without-contexts", 3, 70, 37, 45, 0, bias=True),
    Case("without-contexts-k-major", 2, 150, 600, 136, 0),
    Case("without-contexts-apart", 2, 20, 70, 50, 0),
    Case("pieces-of-rows", 5, 0, 2048, 136, 3, lengths=(1, 64, 200, 0, 131)),
    Case("pieces-of-rows-shared", 12, 43, 20, 36, 5, rows=3, index=(0, 1, 2) * 4),
    # rows of x, and of dy, that would share one set of the first cache
    Case("rows-pages-apart", 4, 33, 2048, 6, 3, rows=2, index=(0, 1, 0, 1), bias=True),
    Case("rows-of-dy-pages-apart", 4, 33, 6, 2048, 3, rows=2, index=(0, 1, 0, 1)),
    # the same, copied for products of many columns
    Case("rows-pages-apart-many-columns", 2, 20, 2048, 136, 3, bias=True),
    Case("rows-of-dy-pages-apart-many-columns", 2, 20, 136, 2048, 3),
    # gradients of `bilinear` that are written past the caches, from registers and by whole lines
    Case("large", 3, 5, 260, 260, 32),
    Case("large-odd", 3, 5, 260, 261, 31),
    Case("large-parts-of-lines", 3, 5, 250, 250, 48),
    # four vectors of a row at once: added to, and written past the caches
    Case("many-rows-wide-k", 2, 150, 33, 40, 128),
    Case("large-wide-k", 24, 1, 192, 200, 64),
    # contexts as lanes: two vectors of them, one, one and a half, a half, most of one and words of one element
    Case("two-vectors-of-contexts", 32, 4, 34, 70, 19, bias=True),
    Case("a-vector-of-contexts", 16, 5, 34, 70, 18, bias=True),
    Case("contexts-and-a-half", 23, 3, 35, 64, 16),
    Case("half-a-vector-of-contexts", 8, 3, 18, 40, 32, weight=False),
    Case("most-of-a-vector-of-contexts", 13, 4, 34, 70, 19),
]


# sums that are cut, and the strategy, None for the one that is chosen for them
LONG = [
    (Case("long-rows", 2, 2048, 24, 40, 8), None),
    (Case("long-sums", 2, 40, 4096, 40, 4), None),
    (Case("long-sums-of-dx", 2, 40, 40, 4096, 4), None),
    (Case("long-sums-of-d-and-k", 16, 1, 512, 64, 64), "outer"),
    (Case("long-sums-of-e", 8, 1, 32, 4096, 16), "outer"),
    (Case("long-sums-of-e-by-pairs-of-rows", 8, 1, 35, 1101, 80), "outer"),
    (Case("long-sums-of-e-by-four-vectors", 49, 1, 35, 1100, 64), "outer"),
    (Case("long-sums-of-contexts", 1500, 2, 16, 16, 4), "panel"),
]


def k_major(inputs):
    """`bilinear` with its last dimension outermost in memory, and a transposed weight."""
    inputs.bilinear = inputs.bilinear.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inputs.weight = inputs.weight.t().contiguous().t()
    return inputs


def inputs_of(case, *dtypes):
    made = make_inputs(case, *dtypes)
    if case.id.endswith("apart") and case.K == 0:
        made.weight = torch.stack([made.weight, made.weight], -1)[..., 0]
    return k_major(made) if case.id.endswith("k-major") else made


@pytest.fixture
def isa(request):
    with force(isa=request.param):
        yield request.param


def cpu(**how):
    return functools.partial(ctxkern.modulated_linear, backend="cpu", **how)


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    with force(strategy=request.param):
        yield request.param


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_case_table(isa, strategy, dtypes):
    for case in CASES + LARGER:
        check(cpu(), inputs_of(case, *dtypes), f"{isa} {strategy} {case.id}")


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("case", "strategy"), LONG, ids=[case.id for case, _ in LONG])
def test_long_sums(isa, case, strategy):
    for dtypes in DTYPES.values():
        with force(strategy=strategy):
            check(cpu(), make_inputs(case, *dtypes), f"{isa} {case.id}")


ZERO = [
    Case(f"{name} of zero{', a context per token' if per_token else ''}", *sizes, per_token=per_token, bias=True)
    for per_token in (False, True)
    for name, sizes in {
        "B": (0, 3, 5, 8, 4),
        "S": (2, 0, 5, 8, 4),
        "D": (2, 3, 0, 8, 4),
        "E": (2, 3, 5, 0, 4),
        "K": (2, 3, 5, 8, 0),
    }.items()
]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_sizes_of_zero_end(isa, strategy):
    for case, dtypes in itertools.product(ZERO, DTYPES.values()):
        check(cpu(), make_inputs(case, *dtypes), f"{isa} {strategy} {case.id}")


MIXED_CASES = [
    Case("mixed", 3, 9, 35, 37, 18, bias=True),
    Case("mixed-shared", 5, 2, 16, 24, 16, rows=4, index=(3, 0, 3, 1, 0), bias=True),
    Case("mixed-per-token", 2, 5, 12, 9, 6, per_token=True),
    Case("mixed-no-weight", 2, 6, 20, 33, 8, weight=False),
]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_every_operand_has_its_own_dtype(isa, strategy, mix):
    for case in MIXED_CASES:
        check(direct(cpu_backend), mixed(make_inputs(case), mix), f"{isa} {strategy} {case.id}")


def test_a_gradient_reads_nothing_that_it_does_not_need():
    """Of one operand alone, in a process that dies where it reads others."""
    assert python(UNREAD_CODE.format(backend="cpu", unread=UNREAD)) == "read nothing else"


def test_operands_without_memory_are_refused():
    inputs = make_inputs(BY_ID["tiny"])
    operands = Operands(inputs.x, inputs.context, [inputs.weight], [inputs.bilinear], [None])
    for name, wrong in {
        "x": operands._replace(x=torch._efficientzerotensor(inputs.x.shape)),
        "context": operands._replace(context=torch._efficientzerotensor(inputs.context.shape)),
        "bilinear": operands._replace(bilinears=[torch._efficientzerotensor(inputs.bilinear.shape)]),
    }.items():
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            cpu_backend.forward(wrong, 1 << 20)


def test_any_workspace_is_taken():
    inputs = make_inputs(BY_ID["odd"])
    same_bits(run(cpu(), inputs), run(cpu(workspace_bytes=1 << 90), inputs))


_DEFAULT_DEVICE = """
import functools, torch, ctxkern
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.force import force
from ctxkern.testing.oracle import run

fn = functools.partial(ctxkern.modulated_linear, backend="cpu")
# a workspace of more than a megabyte, rows to gather, gradients of a strided bilinear
case = Case("large", 24, 40, 256, 256, 32, rows=9, index=tuple(i % 9 for i in range(24)), bias=True)
for strategy in ("panel", "outer"):
    with force(strategy=strategy):
        inputs = make_inputs(case)
        before = run(fn, inputs)
        torch.set_default_device("meta")
        after = run(fn, inputs)
        torch.set_default_device(None)
    for name, value in before.items():
        assert after[name].device.type == "cpu" and torch.equal(value, after[name]), name
"""


def test_memory_does_not_follow_the_default_device():
    python(_DEFAULT_DEVICE)


@pytest.mark.parametrize("isa", ISAS[-1:], indirect=True)
@pytest.mark.parametrize("workspace", [1, 1 << 14, 1 << 18])
def test_groups_of_contexts(isa, strategy, workspace):
    for case in LARGER:
        for dtypes in DTYPES.values():
            check(cpu(workspace_bytes=workspace), inputs_of(case, *dtypes), f"{isa} {strategy} {workspace} {case.id}")


def test_the_table_takes_the_strategies(strategy):
    inputs = make_inputs(BY_ID["debug"])
    positional, keyword = inputs.arguments()
    assert ctxkern.explain(*positional, **keyword).strategy == strategy
    assert ctxkern.explain(*positional, **keyword).backend == "cpu"


def same_bits(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtypes, strategy, threads):
    for case in (BY_ID["debug"], BY_ID["ragged-shared"], *LARGER, BENCH_CASES[1]):
        inputs = inputs_of(case, *dtypes)
        threads(1)
        alone = run(cpu(), inputs)
        for count in (2, 3, 7):
            threads(count)
            same_bits(alone, run(cpu(), inputs))


def test_several_threads_at_once():
    inputs = make_inputs(BENCH_CASES[1])
    expected = run(cpu(), inputs)
    failures = []

    def work():
        try:
            for _ in range(3):
                same_bits(expected, run(cpu(), inputs))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def python(code, **env):
    """Output of `code` in a fresh process that imports this very package."""
    env = {**os.environ, "PYTHONPATH": str(Path(ctxkern.__file__).parents[1]), **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_FORK = """
import os, torch, ctxkern
from ctxkern.testing.cases import BENCH_CASES, make_inputs
torch.set_num_threads(2)
inputs = make_inputs(BENCH_CASES[1])
args, kwargs = inputs.arguments()
before = ctxkern.modulated_linear(*args, backend="cpu", **kwargs)
child = os.fork()
if child == 0:
    after = ctxkern.modulated_linear(*args, backend="cpu", **kwargs)
    torch.set_num_threads(1)  # PyTorch's own comparison would wait for threads that are not there
    os._exit(0 if torch.equal(before, after) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(before, ctxkern.modulated_linear(*args, backend="cpu", **kwargs))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_after_a_fork():
    python(_FORK)


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_named_in_the_environment(isa):
    code = """
import ctxkern
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.testing.cases import CASES, make_inputs
from ctxkern.testing.oracle import check
check(ctxkern.modulated_linear, make_inputs(next(case for case in CASES if case.id == "prime")))
print(cpu_runtime.cpu_isa())
"""
    assert python(code, CTXKERN_CPU_ISA=isa) == isa


def test_what_it_does_not_take():
    inputs = make_inputs(BY_ID["tiny"], torch.float64)
    positional, _ = inputs.arguments()
    with pytest.raises(RuntimeError, match="backend 'cpu' takes float32, bfloat16 or float16, not float64"):
        cpu()(*positional)
    with pytest.raises(RuntimeError, match="not on meta"):
        cpu()(*(t.to("meta", torch.float32) for t in positional))


def test_special_values_reach_the_output():
    """What is not finite in one context's operands shows in its own results and in no other's."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(Case("three", 3, 6, 33, 35, 7), dtype)
        clean = run(cpu(), inputs)
        inputs.x[1, 2, 3] = float("nan")
        inputs.context[1, 0] = float("inf")
        got = run(cpu(), inputs)
        assert got["y"][1].isnan().any()
        assert not got["y"][1].isfinite().all()
        for b in (0, 2):
            assert torch.equal(got["y"][b], clean["y"][b])
            assert torch.equal(got["dx"][b], clean["dx"][b])
            assert torch.equal(got["dcontext"][b], clean["dcontext"][b])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("count", [3, 8, 13, 16])
def test_a_special_value_of_bilinear_stays_in_its_column(isa, strategy, count):
    """Where K is odd a word of it would reach into the next column."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(Case("odd-k", count, 6, 34, 70, 7), dtype)
        inputs.bilinear[4, 5, 0] = float("inf")
        finite = run(cpu(), inputs)["y"].isfinite()
        assert not finite[..., 5].any()
        assert finite[..., [e for e in range(70) if e != 5]].all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_many_contexts_there_are_changes_no_bit_of_one(isa, dtype):
    """Weights of as many as a vector holds are made in another way, by the same sums."""
    for count, context_dim in itertools.product((7, 8, 13, 15, 16, 23, 24, 31, 32, 40), (18, 19)):
        inputs = make_inputs(Case("contexts", count, 5, 34, 70, context_dim, bias=True), dtype)
        with force(strategy="panel"):
            together = run(cpu(), inputs)
            for b in (0, count - 1):
                part = {name: getattr(inputs, name)[b : b + 1] for name in ("x", "context", "dy")}
                alone = run(cpu(), replace(inputs, **part))
                for name in ("y", "dx", "dcontext"):
                    assert torch.equal(together[name][b], alone[name][0]), (count, b, name)


def test_symbols_of_an_instruction_set_stay_in_it():
    """No code of one set's files can be linked in place of another's: all they define is local or data."""
    library = Path(cpu_runtime.load().__file__)
    try:
        done = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("nm is not here")
    weak = [
        line for line in done.stdout.splitlines() if line[17:18] in "WV" and "ctxkern::(anonymous namespace)" in line
    ]
    assert not weak, weak[0]


@st.composite
def drawn_cases(draw):
    """Sizes around the widths of vectors and tiles; padded, packed or a context per token; every layout."""
    kind = draw(st.sampled_from(("padded", "packed", "per-token")))
    B = draw(st.integers(0, 6))
    rows = draw(st.integers(1, 5)) if kind != "per-token" and draw(st.booleans()) else None
    return Case(
        "drawn",
        B,
        0 if kind == "packed" else draw(st.integers(0, 40)),
        draw(st.integers(0, 70)),
        draw(st.integers(0, 70)),
        draw(st.integers(0, 40)),
        rows=rows,
        index=None if rows is None else tuple(draw(st.lists(st.integers(0, rows - 1), min_size=B, max_size=B))),
        lengths=tuple(draw(st.lists(st.integers(0, 40), min_size=B, max_size=B))) if kind == "packed" else None,
        per_token=kind == "per-token",
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(("contiguous", "strided", "expanded"))) if kind != "packed" else "contiguous",
        bilinear_layout=draw(st.sampled_from(("contiguous", "permuted", "strided", "expanded"))),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(drawn_cases(), st.sampled_from(list(DTYPES)), st.sampled_from(STRATEGIES), st.sampled_from((1, 1 << 15, None)))
def test_any_shape_and_stride(case, dtypes, strategy, workspace):
    with force(strategy=strategy):
        check(cpu(workspace_bytes=workspace), make_inputs(case, *DTYPES[dtypes]), f"{case} {dtypes} {strategy}")

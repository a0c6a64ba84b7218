"""The Triton kernels: both forms over the case table, on a GPU or in Triton's interpreter, and how rows are grouped."""

import functools
import importlib
import random

import pytest
import torch

import ctxkern
from ctxkern import plan as planner
from ctxkern.modulated.operands import Operands
from ctxkern.reference import modulated_qkv_ref
from ctxkern.registry import interpreted
from ctxkern.testing import force
from ctxkern.testing.cases import CASES, DTYPES, Case, make_inputs
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.oracle import check, check_family, run

pytest.importorskip("triton")
if not ctxkern.backends()["triton"]:
    pytest.skip(str(ctxkern.backends()["triton"]), allow_module_level=True)

DEVICE = "cpu" if interpreted() else "cuda"
FORMS = ("panel", "outer")
if interpreted():
    DTYPES = {name: pair for name, pair in DTYPES.items() if pair[0] is not torch.bfloat16}
# the interpreter needs 20 to 60 seconds for each of these, and 5 to 20 for these in every dtype
SLOW, LONG = ({"deep", "non-power-of-two"}, {"debug", "prime"}) if interpreted() else (set(), set())
# mixes of dtypes have tests of their own (test_mixes.py, test_triton_numerics.py)
MIXED = {"f16-f32-params"} if interpreted() else set()

triton_linear = functools.partial(ctxkern.modulated_linear, backend="triton")


@pytest.fixture
def form(request):
    with force(strategy=request.param):
        yield request.param


def _table():
    for name in FORMS:
        for dtypes in DTYPES:
            for case in CASES:
                if name == "panel" and case.per_token:
                    continue
                slow = (
                    case.id in SLOW
                    or (case.id in LONG and dtypes != "f32")
                    or (dtypes in MIXED and case.id != "ragged")
                )
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(name, dtypes, case, id=f"{case.id}-{dtypes}-{name}", marks=marks)


@pytest.mark.parametrize(("form", "dtypes", "case"), list(_table()), indirect=["form"])
def test_table(form, dtypes, case):
    check(triton_linear, make_inputs(case, *DTYPES[dtypes], device=DEVICE), case.id)


# contexts in several groups, strips of a few columns and rows, blocks of a part of E; K over several blocks
SMALL = [
    (Case("groups", 10, 3, 12, 20, 5, bias=True), 2048),
    (Case("groups-wide-k", 5, 4, 6, 10, 40), 1024),
    (Case("blocks-of-e", 3, 5, 9, 150, 4), 4096),
    (Case("least", 3, 4, 5, 6, 3, bias=True), 1),
    (Case("shared-groups", 9, 4, 12, 20, 6, rows=4, index=(3, 1, 3, 0, 0, 2, 3, 1, 1)), 2048),
]


@pytest.mark.parametrize("form", ["panel"], indirect=True)
@pytest.mark.parametrize("dtypes", [pytest.param(d, marks=[] if d == "f32" else pytest.mark.slow) for d in DTYPES])
@pytest.mark.parametrize(("case", "workspace"), SMALL, ids=[case.id for case, _ in SMALL])
def test_small_workspace(form, case, workspace, dtypes):
    fn = functools.partial(triton_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, *DTYPES[dtypes], device=DEVICE), case.id)


# 16 bytes hold what divides their sizes, which kernels tell Triton; blocks that these do not divide
EIGHTS = [
    (Case("eights", 2, 5, 24, 40, 5, bias=True), None),
    (Case("eights-ragged", 3, 0, 8, 24, 3, lengths=(4, 0, 3)), None),
    (Case("eights-in-blocks", 2, 3, 24, 8, 3), 256),
]


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(("case", "workspace"), EIGHTS, ids=[case.id for case, _ in EIGHTS])
def test_sizes_that_8_divides_and_not_16(form, case, workspace):
    fn = functools.partial(triton_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, torch.float16, device=DEVICE), case.id)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("lengths", [None, (3, 0, 5, 2)], ids=["padded", "packed"])
def test_three_projections_share_dx_and_dcontext(form, lengths):
    case = Case("qkv", 4, 5, 12, 20, 6, rows=3, index=(2, 0, 2, 1), lengths=lengths, bias=True)
    arguments, douts = qkv_arguments(case, widths=(20, 9, 33))
    arguments = {name: t if t is None else t.to(DEVICE) for name, t in arguments.items()}
    fn = by_projection(functools.partial(ctxkern.modulated_qkv, backend="triton"))
    check_family(fn, by_projection(modulated_qkv_ref), arguments, [dout.to(DEVICE) for dout in douts], "qkv")


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_same_bits(form):
    inputs = make_inputs(next(c for c in CASES if c.id == "shared-uneven"), torch.float16, device=DEVICE)
    first, second = run(triton_linear, inputs), run(triton_linear, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(not interpreted(), reason="a GPU orders programs as it likes")
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_the_order_of_programs_changes_no_bit(form, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx

    def set_grid_idx(x, y, z):
        nx, ny, nz = builder.grid_dim
        order = random.Random(nx * ny * nz).sample(range(nx * ny * nz), nx * ny * nz)
        at = order[(x * ny + y) * nz + z]
        in_order(at // (ny * nz), at // nz % ny, at % nz)

    case = Case("shuffled", 9, 4, 12, 70, 6, rows=4, index=(3, 1, 3, 0, 0, 2, 3, 1, 1), bias=True)
    inputs = make_inputs(case, device=DEVICE)
    fn = functools.partial(triton_linear, workspace_bytes=1 << 14)
    want = run(fn, inputs)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    got = run(fn, inputs)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("damage", ["zeros", "the neighbour's context"])
def test_wrong_results_are_noticed(form, damage, monkeypatch):
    from ctxkern.runtime.triton import launches

    backend = importlib.import_module("ctxkern.modulated.triton")
    forward, launched = backend.forward, launches.Launches.run

    def of_a_neighbour(self, tensors, device):
        x, context, *others = tensors
        launched(self, [x, context.roll(1, 0), *others], device)

    if damage == "zeros":
        monkeypatch.setattr(backend, "forward", lambda *args: [y.zero_() for y in forward(*args)])
    else:
        monkeypatch.setattr(launches.Launches, "run", of_a_neighbour)
    with pytest.raises(AssertionError, match="y: rms error"):
        check(triton_linear, make_inputs(next(c for c in CASES if c.id == "shared-uneven"), device=DEVICE))


@pytest.mark.parametrize("needed", ["x", "context", "weight", "bilinear", "bias"])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_one_gradient_alone(form, needed):
    inputs = make_inputs(next(c for c in CASES if c.id == "tiny"), device=DEVICE)
    want = run(triton_linear, inputs)[f"d{needed}"]
    leaf = getattr(inputs, needed).requires_grad_()
    positional, keyword = inputs.arguments()
    (got,) = torch.autograd.grad(triton_linear(*positional, **keyword), leaf, inputs.dy)
    assert torch.equal(got, want)


@pytest.mark.skipif(not interpreted(), reason="a GPU asserts on the device, which ends the process")
def test_indices_are_checked():
    x, context, bilinear = torch.randn(2, 3, 4), torch.randn(5, 2), torch.randn(4, 6, 2)
    with pytest.raises(ValueError, match=r"context_index\[1\] is 5"):
        triton_linear(x, context, None, bilinear, context_index=torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="float64"):
        triton_linear(x.double(), context.double(), None, bilinear.double(), context_index=torch.tensor([0, 1]))


def test_explain_tells_form_and_blocks():
    x, context, bilinear = torch.randn(3, 64, 8), torch.randn(3, 4), torch.randn(8, 10, 4)
    arguments = (x.to(DEVICE), context.to(DEVICE), None, bilinear.to(DEVICE))
    plan = ctxkern.explain(*arguments, backend="triton")
    assert (plan.strategy, plan.backend, plan.contexts, plan.strip, plan.group) == ("panel", "triton", 3, 10, 3)
    assert ctxkern.explain(x[:, :2].contiguous().to(DEVICE), *arguments[1:], backend="triton").strategy == "outer"
    assert ctxkern.explain(*arguments, backend="triton", backward=True).strip_of == "D"


@pytest.mark.parametrize("backward", [False, True])
def test_predicted_seconds_are_no_less_than_the_floor_of_an_h100(backward):
    from ctxkern.modulated.triton import plan as planned

    for B, S, D, K in ((16, 2048, 2048, 32), (32, 512, 1024, 64), (64, 1, 2048, 32)):
        x, context, bilinear = (
            torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((B, S, D), (B, K), (D, D, K))
        )
        operands = Operands(x, context, [None], [bilinear], [None])
        plan = planned(operands, planner.DEFAULT_WORKSPACE, backward)
        flops, moved = plan.flops / planner.H100.flops[torch.bfloat16], plan.bytes / planner.H100.bandwidth
        assert plan.predicted_seconds >= (2 if backward else 1) * max(flops, moved) * 0.99
        assert "on an H100" in str(plan)


def _grouped(index, lengths, table, block, monkeypatch):
    from ctxkern.runtime.triton import launches
    from ctxkern.runtime.triton.grouping import group_rows
    from ctxkern.runtime.triton.launches import Layout, operands_of

    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    rows, sequences = sum(lengths), len(lengths)
    table = table if index is not None else sequences
    index = None if index is None else torch.tensor(index, device=DEVICE)
    layout, buffers = Layout(2), []
    groups = group_rows(layout, (rows, sequences, 0, table), *operands_of((index, bounds)), block)

    def empty(*args, **options):
        buffers.append(torch.empty(*args, **options))
        return buffers[-1]

    monkeypatch.setattr(launches, "empty", empty)
    layout.done().run((index, bounds), bounds.device)
    values, limit = buffers[groups.buffer.at - 2].tolist(), groups.limit
    contexts, tiles = values[:2]
    slot = values[2 : 2 + contexts]
    first = values[2 + limit : 3 + limit + contexts]
    tile_context = values[4 + 3 * limit : 4 + 3 * limit + tiles]
    order = values[4 + 3 * limit + groups.tiles :] if groups.ordered else range(rows)
    assert tiles <= groups.tiles
    return {s: list(order[first[u] : first[u + 1]]) for u, s in enumerate(slot)}, tile_context


@pytest.mark.parametrize("indexed", [True, False])
def test_grouping_brings_the_rows_of_a_context_together(indexed, monkeypatch):
    random.seed(0)
    for sequences in (1, 3, 7, 70, 300):
        table, block = random.choice([1, 4, 50]), random.choice([16, 32])
        lengths = [random.choice([0, 1, 5, 17, 40]) for _ in range(sequences)]
        index = [random.randrange(table) for _ in range(sequences)] if indexed else None
        want, row = {}, 0
        for b, length in enumerate(lengths):
            want.setdefault(index[b] if indexed else b, []).extend(range(row, row + length))
            row += length
        want = {context: rows for context, rows in want.items() if rows}
        got, tile_context = _grouped(index, lengths, table, block, monkeypatch)
        assert list(got.items()) == list(want.items())
        assert tile_context == [u for u, rows in enumerate(want.values()) for _ in range(-(-len(rows) // block))]

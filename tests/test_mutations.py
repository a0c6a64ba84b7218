"""The oracle rejects what is wrong: damaged results, in every tensor and dtype, and damaged implementations."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import ctxkern
from ctxkern.factored import operands as factored_operands
from ctxkern.lora import cpu as lora_cpu
from ctxkern.lora import portable as lora
from ctxkern.modulated.portable import modulated, outer, panel
from ctxkern.modulated.portable.call import Partial
from ctxkern.plan import compute_dtype
from ctxkern.reference import factored_modulated_linear_ref, lora_linear_ref, modulated_linear_ref
from ctxkern.runtime import rows
from ctxkern.testing import force
from ctxkern.testing.cases import CASES, Case, make_inputs
from ctxkern.testing.families import factored_arguments, lora_arguments
from ctxkern.testing.oracle import assert_matches, baseline, check, check_family, oracle, run


@pytest.fixture(autouse=True)
def _portable():
    """What is damaged here is the portable backend."""
    with force(backend="portable"):
        yield


@pytest.fixture(autouse=True)
def _unwritten_outputs_are_nan():
    """A block that was just freed may hold the right result of the run before, which would hide a missing write."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SQUARE = Case("square", 6, 7, 12, 12, 4, rows=4, index=(0, 1, 3, 1, 2, 0), bias=True)
computes_in_bfloat16 = pytest.mark.skipif(
    compute_dtype("cpu", torch.bfloat16) is not torch.bfloat16, reason="this CPU computes bfloat16 in float32"
)
NAMES = ("y", "dx", "dcontext", "dweight", "dbilinear", "dbias")


def last_element(t, change):
    changed = t.clone()
    last = (-1,) * t.dim()
    changed[last] = change(t[last], t.abs().max())
    return changed


# what a problem points to
OTHER_SEED = torch.tensor(8)
# of one tensor, whatever it is
DAMAGE = {
    "zeroed": torch.zeros_like,
    "negated": torch.neg,
    "scaled": lambda t: t * 1.05,
    "rolled": lambda t: t.roll(1, 0),
    "one-wrong-element": lambda t: last_element(t, lambda v, top: v + 0.25 * top),
    "one-zero-row": lambda t: torch.cat([torch.zeros_like(t[:1]), t[1:]]),
    "nan": lambda t: last_element(t, lambda v, top: v * float("nan")),
    "infinite": lambda t: last_element(t, lambda v, top: v + float("inf")),
    "another-dtype": lambda t: t.to(torch.float32 if t.dtype is torch.float64 else torch.float64),
    "another-shape": lambda t: t[None],
    "cut": lambda t: t[:-1],
}
# of the tensors that have the structure in question
STRUCTURAL = {
    "sequences-swapped": (("y", "dx"), lambda t: t[[1, 0, *range(2, len(t))]]),
    "tokens-reversed": (("y", "dx"), lambda t: t.flip(1)),
    "contexts-rolled": (("dcontext",), lambda t: t.roll(1, 0)),
    "d-and-e-transposed": (("dweight", "dbilinear"), lambda t: t.transpose(0, 1).contiguous()),
    "context-dim-rolled": (("dbilinear", "dcontext"), lambda t: t.roll(1, -1)),
    "columns-reversed": (NAMES, lambda t: t.flip(-1)),
}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def results(request):
    inputs = make_inputs(SQUARE, request.param)
    return inputs, oracle(inputs), baseline(inputs)


def assert_rejected(name, wrong, exact, plain):
    with pytest.raises(AssertionError, match=name):
        assert_matches({name: wrong}, {name: exact[name]}, {name: plain[name]})


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_rejects_a_damaged_tensor(results, name, damage):
    _, exact, plain = results
    assert_matches(plain, exact, plain)
    assert_rejected(name, damage(plain[name]), exact, plain)


@pytest.mark.parametrize(("names", "damage"), STRUCTURAL.values(), ids=STRUCTURAL)
def test_rejects_a_permutation(results, names, damage):
    _, exact, plain = results
    for name in names:
        assert_rejected(name, damage(plain[name]), exact, plain)


# what a context's values reach: not dweight and dbias, which are sums of x^T dy and dy
@pytest.mark.parametrize("name", ["y", "dx", "dbilinear", "dcontext"])
def test_rejects_the_next_sequences_context(results, name):
    inputs, exact, plain = results
    shifted = replace(inputs, context_index=inputs.context_index.roll(1))
    assert_rejected(name, baseline(shifted)[name], exact, plain)


@pytest.mark.parametrize("name", NAMES)
def test_rejects_a_missing_context(results, name):
    inputs, exact, plain = results
    present = (inputs.context_index != 3).to(inputs.dy.dtype)[:, None, None]
    without = baseline(replace(inputs, dy=inputs.dy * present))
    without["y"] = plain["y"] * present
    assert_rejected(name, without[name], exact, plain)


def test_rejects_a_missing_or_additional_tensor(results):
    _, exact, plain = results
    with pytest.raises(AssertionError, match="tensors"):
        assert_matches({n: plain[n] for n in NAMES[1:]}, exact, plain)
    with pytest.raises(AssertionError, match="tensors"):
        assert_matches(plain | {"dz": plain["y"]}, exact, plain)


def test_rejects_half_precision_sums_of_a_float32_call():
    def rounded(x, *rest, **how):
        return modulated_linear_ref(x.half().float(), *rest, **how)

    with pytest.raises(AssertionError, match="y: rms"):
        check(rounded, make_inputs(SQUARE))


def catches(dtype=torch.float32, workspace=1 << 12):
    """The names of the cases of the table that fail as the implementation now is."""

    caught = []
    for case in CASES:
        try:
            check(partial(ctxkern.modulated_linear, workspace_bytes=workspace), make_inputs(case, dtype), case.id)
        except AssertionError:
            caught.append(case.id)
    return caught


def test_the_table_catches_nothing_as_it_is():
    assert catches() == []


def test_catches_a_skipped_strip(monkeypatch):
    spans = panel._Strips.spans
    monkeypatch.setattr(panel._Strips, "spans", lambda self: spans(self)[:-1] or spans(self))
    assert {"debug", "prime", "deep"} <= set(catches())


def test_catches_a_skipped_group_of_contexts(monkeypatch):
    groups = panel._Strips.groups
    monkeypatch.setattr(panel._Strips, "groups", lambda self: groups(self)[:-1] or groups(self))
    assert "non-power-of-two" in catches(workspace=1)


def test_catches_a_skipped_chunk_of_columns(monkeypatch):
    chunks = outer._chunks
    monkeypatch.setattr(outer, "_chunks", lambda size, step: chunks(size, step)[:-1] or chunks(size, step))
    assert {"decode", "context-per-token"} <= set(catches(workspace=1))


def test_catches_rows_left_in_grouped_order(monkeypatch):
    monkeypatch.setattr(rows.Rows, "scatter", lambda self, y, like: y.view(*like.shape[:-1], y.shape[-1]))
    assert {"shared-uneven-wide-k", "ragged-shared"} <= set(catches())


def test_catches_rows_under_the_neighbours_context(monkeypatch):
    pick = rows.Rows.pick
    monkeypatch.setattr(rows.Rows, "pick", lambda self, table: pick(self, table).roll(1, 0))
    assert {"tiny", "shared-uneven-wide-k", "ragged"} <= set(catches())


def test_catches_rows_under_the_wrong_bucket(monkeypatch):
    made = rows._rows

    def shifted(slots, *rest):
        found = made(slots, *rest)
        order = torch.tensor([*slots[1:], *slots[:1]])
        return replace(found, slots=order)

    monkeypatch.setattr(rows, "_rows", shifted)
    assert {"shared-uneven-wide-k", "ragged-shared", "ragged"} <= set(catches())


def test_catches_bounds_off_by_one(monkeypatch):
    packed = rows._group_packed

    def shifted(index, bounds, *rest):
        inner = [min(b + 1, bounds[-1]) for b in bounds[1:-1]]
        return packed(index, [bounds[0], *inner, bounds[-1]], *rest)

    monkeypatch.setattr(rows, "_group_packed", shifted)
    assert {"ragged", "ragged-empty-sequences", "ragged-shared"} <= set(catches())


def test_catches_float16_accumulation_over_strips(monkeypatch):
    project = panel._project

    def rounded(x, weights, y, first):
        project(x, weights, y, first)
        y.copy_(y.half())

    monkeypatch.setattr(panel, "_project", rounded)
    assert {"debug", "prime"} <= set(catches())


@computes_in_bfloat16
def test_catches_accumulation_in_a_half_over_many_strips(monkeypatch):
    dtype, project = torch.bfloat16, panel._project

    def rounded(x, weights, y, first):
        project(x, weights, y, first)
        y.copy_(y.to(dtype))

    monkeypatch.setattr(panel, "_project", rounded)
    deep = next(case for case in CASES if case.id == "deep")
    with pytest.raises(AssertionError, match="deep y: rms"):
        check(partial(ctxkern.modulated_linear, workspace_bytes=1), make_inputs(deep, dtype), deep.id)


def test_catches_dcontext_of_the_last_strip_alone(monkeypatch):
    backward, spans = panel.panel_backward, panel._Strips.spans

    def last_alone(call, plan, dy, grads):
        backward(call, plan, dy, grads)
        last = Partial(None, False, grads.need_contexts, False, False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(panel._Strips, "spans", lambda self: spans(self)[-1:])
            backward(call, plan, dy, last)
        grads.contexts = last.contexts

    monkeypatch.setattr(modulated, "panel_backward", last_alone)
    assert {"debug", "prime"} <= set(catches())


def test_catches_dcontext_not_summed_over_a_contexts_sequences(monkeypatch):
    def last(self, picked, size):
        return picked if self.slots is None else picked.new_zeros(size, picked.shape[1])

    monkeypatch.setattr(rows.Rows, "unpick", last)
    assert {"shared-uneven", "shared-uneven-wide-k", "table-larger-than-batch"} <= set(catches())


def test_catches_dbilinear_of_the_last_group_alone(monkeypatch):
    add = panel._Strips.add_dbilinear

    def overwrite(self, products, contexts, total):
        total.started = False
        add(self, products, contexts, total)

    monkeypatch.setattr(panel._Strips, "add_dbilinear", overwrite)
    assert "non-power-of-two" in catches(workspace=1)


@computes_in_bfloat16
def test_catches_a_projection_that_writes_over_the_strip_before(monkeypatch):
    project = panel._project
    monkeypatch.setattr(panel, "_project", lambda x, weights, y, first: project(x, weights, y, True))
    assert {"debug", "prime"} <= set(catches(torch.bfloat16))


def test_catches_lora_pieces_under_the_wrong_adapter(monkeypatch):
    pieces = lora._pieces

    def shifted(rows, operands, *rest):
        return pieces(rows, operands._replace(A=operands.A.roll(1, 0)), *rest)

    monkeypatch.setattr(lora, "_pieces", shifted)
    arguments, dout = lora_arguments(CASES[2], 3)
    with pytest.raises(AssertionError, match=r"y: rms"):
        check_family(partial(ctxkern.lora_linear, backend="portable"), lora_linear_ref, arguments, dout)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("y", {"scale": 1.5}),
        ("y", {"ranks": None}),
        ("y", {"scales": None}),
        ("y", {"seed": OTHER_SEED}),
        ("y", {"kept_from": 1 << 30}),
        ("y", {"adds": False}),
        ("y", {"B": 6}),
        ("dA", {"dA": None}),
        ("dB", {"dB": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_catches_a_low_rank_call_made_wrongly(monkeypatch, what, change):
    made = lora_cpu._run

    def changed(operands, rows, gradients, gates, adds, scale, kept_from):
        if "B" in change:
            change["B"] = operands.B[:, :6]
        operands = operands._replace(**{name: change[name] for name in change if hasattr(operands, name)})
        if gradients is not None:
            dx, dA, dB = gradients
            gradients = dx, change.get("dA", dA), change.get("dB", dB)
        options = change.get("adds", adds), change.get("scale", scale), change.get("kept_from", kept_from)
        made(operands, rows, gradients, gates, *options)

    monkeypatch.setattr(lora_cpu, "_run", changed)
    arguments, dout = lora_arguments(Case("planted", 5, 4, 6, 8, 3, rows=4, index=(3, 0, 3, 1, 0)), 3)
    arguments |= {"ranks": torch.tensor([2, 3, 1, 1]), "dropout": 0.4, "seed": 7}
    del arguments["scale"]
    scale = torch.tensor([0.5, 2.0, 1.0, 3.0])

    def reference(**tensors):
        return lora_linear_ref(**tensors, scale=scale.to(tensors["x"].dtype))

    def check_it():
        check_family(partial(ctxkern.lora_linear, backend="cpu", scale=scale), reference, arguments, dout)

    with monkeypatch.context() as whole:
        whole.setattr(lora_cpu, "_run", made)
        check_it()
    with pytest.raises(AssertionError, match=f"{what}: (rms|not finite)"):
        check_it()


@pytest.mark.parametrize(
    ("what", "change"), [("y", "values"), ("y", "rows"), ("dcontext", "products")], ids=lambda value: value
)
def test_catches_gates_left_out(monkeypatch, what, change):
    made = factored_operands._gates

    def changed(*given):
        gates = made(*given)
        without = torch.ones_like(gates.values) if change == "values" else None
        return gates._replace(**{change: without})

    monkeypatch.setattr(factored_operands, "_gates", changed)
    arguments, dout = factored_arguments(Case("planted", 5, 4, 6, 8, 3, rows=20, index=(3, 0, 3, 1, 0)), 3)
    fn = partial(ctxkern.factored_modulated_linear, backend="cpu")
    with pytest.raises(AssertionError, match=f"{what}: (rms|not finite)"):
        check_family(fn, factored_modulated_linear_ref, arguments, dout)


def test_run_gives_every_gradient():
    inputs = make_inputs(SQUARE)
    assert tuple(run(ctxkern.modulated_linear, inputs)) == ("y", "dx", "dcontext", "dweight", "dbilinear", "dbias")

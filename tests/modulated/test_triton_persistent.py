"""The persistent form of the panel kernels: the case table with programs in turn and interleaved, and broken copies."""

import functools
import importlib.util
import inspect

import pytest
import torch

import ctxkern
from ctxkern import plan as planner
from ctxkern.registry import interpreted
from ctxkern.testing.cases import CASES, DTYPES, Case, make_inputs
from ctxkern.testing.oracle import assert_matches

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("programs are ordered in Triton's interpreter alone (TRITON_INTERPRET=1)", allow_module_level=True)

from ctxkern.modulated.triton import persistent, persistent_kernel
from ctxkern.runtime.triton import launches, tiles
from ctxkern.testing.interpreter import interleaved

HERE = {name: pair for name, pair in DTYPES.items() if pair[0] is not torch.bfloat16}
# the interpreter needs seconds for each of these
SLOW = ("deep", "non-power-of-two", "debug", "prime")


def _table():
    for dtypes in HERE:
        for case in CASES:
            if not case.per_token and (case.id not in SLOW or dtypes == "f32"):
                marks = [pytest.mark.slow] if case.id in SLOW else []
                yield pytest.param(case, dtypes, id=f"{case.id}-{dtypes}", marks=marks)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The persistent form, with strips and tiles of 16 columns, in a workspace that holds no numbers at first."""
    monkeypatch.setattr(planner, "GPU_OUTER_ROWS", -1)
    monkeypatch.setattr(planner, "GPU_PERSISTENT", True)
    monkeypatch.setattr(tiles, "_NARROW", 16)
    narrow = {"project": {"rows": 16, "columns": 32}, "make": {"rows": 16}, "make-long": {"rows": 16}}
    table = {key: t._replace(**narrow.get(key[0], {})) for key, t in tiles._TILES.items()}
    monkeypatch.setattr(tiles, "_TILES", table)
    monkeypatch.setattr(tiles, "MAKE_ROWS", 8)
    monkeypatch.setattr(persistent, "_STRIPS", 8)
    tiles.forget()
    monkeypatch.setattr(launches, "empty", _garbage)
    yield
    tiles.forget()


def _garbage(size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device).fill_(float("nan") if dtype.is_floating_point else 1 << 30)


def forward(inputs, workspace=1 << 20):
    positional, keyword = inputs.arguments()
    return ctxkern.modulated_linear(*positional, **keyword, backend="triton", workspace_bytes=workspace)


@pytest.mark.parametrize(("case", "dtypes"), list(_table()))
def test_table_in_turn_and_interleaved(case, dtypes, monkeypatch):
    inputs = make_inputs(case, *HERE[dtypes])
    ran = []
    run = persistent.forward
    monkeypatch.setattr(persistent, "forward", lambda *args: (ran.append(args), run(*args)))
    y = forward(inputs)
    assert ran or not y.numel() or not case.D
    with interleaved(3):
        assert torch.equal(forward(inputs), y)
    monkeypatch.undo()
    positional, keyword = inputs.arguments()
    exact = inputs.map(lambda t: t.double())
    reference = functools.partial(ctxkern.modulated_linear, **keyword, backend="reference")
    assert_matches({"y": y}, {"y": reference(*exact.arguments()[0])}, {"y": reference(*positional)}, case.id)


# several tiles of rows a context, five strips
STRIPS = Case("strips", 4, 18, 16, 130, 6, rows=3, index=(2, 1, 2, 0), bias=True)


def test_three_projections_in_one_launch():
    widths = (70, 16, 33)
    inputs = [make_inputs(Case(**{**STRIPS.__dict__, "E": e}), seed=e) for e in widths]
    lists = [[getattr(one, name) for one in inputs] for name in ("weight", "bilinear", "bias")]
    first, index = inputs[0], inputs[0].context_index
    with interleaved(3):
        got = ctxkern.modulated_qkv(first.x, first.context, *lists, context_index=index, backend="triton")
    want = ctxkern.modulated_qkv(first.x, first.context, *lists, context_index=index, backend="reference")
    for y, exact in zip(got, want, strict=True):
        torch.testing.assert_close(y, exact)


@pytest.mark.parametrize("residents", [1, 2, 5])
def test_any_number_of_programs_at_a_time(residents, monkeypatch):
    monkeypatch.setattr(persistent, "programs", lambda device: 7)
    inputs = make_inputs(STRIPS)
    want = forward(inputs)
    for seed in range(4):
        with interleaved(residents, seed) as schedule:
            assert torch.equal(forward(inputs), want)
        assert schedule.switches > 20


def test_contexts_that_the_ring_cannot_hold_take_two_launches():
    inputs = make_inputs(STRIPS)
    with interleaved(2) as schedule:
        y = forward(inputs, workspace=2048)
    assert schedule.switches == 0
    torch.testing.assert_close(y, forward(inputs))


def copy_of_the_kernel(path, old, new):
    source = inspect.getsource(persistent_kernel)
    assert source.count(old) == 1, f"{source.count(old)} of {old!r}"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("ctxkern.modulated.triton._copy_of_the_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTATIONS = {
    "nothing": ("RING = 2", "RING = 3"),
    "project does not wait": ("_wait(made_ptr + strip * blocks + block, made_of)", "pass"),
    "project waits for all tiles but one": ("block, made_of)", "block, made_of - 1)"),
    "make does not wait": ("if strip >= RING:", "if strip >= 1000:"),
    "make waits for all tiles but one": ("block, tiles)", "block, tiles - 1)"),
    "make waits for the strip before": ("(strip - RING) * blocks", "(strip - RING - 1) * blocks"),
    "one slot": ("RING = 2", "RING = 1"),
    "made is never told": ("_signal(made_ptr + strip * blocks + block)", "pass"),
    "projected is never told": ("_signal(projected_ptr + strip * blocks + block)", "pass"),
    "tiles out of order": ("later = claimed - makes\n", "later = claimed - makes + 1\n"),
}


QUICK = ("project does not wait", "make does not wait", "made is never told", "tiles out of order")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MUTATIONS])
def test_a_broken_copy_of_the_kernel_is_found(name, tmp_path, monkeypatch):
    inputs = make_inputs(STRIPS)
    want = forward(inputs)
    monkeypatch.setattr(persistent, "kernels", copy_of_the_kernel(tmp_path / "copy.py", *MUTATIONS[name]))
    tiles.forget()
    found = None
    for seed in range(12):
        try:
            with interleaved(1 + seed % 4, seed):
                y = forward(inputs)
            found = found or (None if torch.equal(y, want) else "wrong")
        except Exception as error:
            if "resident programs wait" not in str(error):
                raise
            found = "stuck"
        if found:
            break
    assert bool(found) == (name != "nothing"), found

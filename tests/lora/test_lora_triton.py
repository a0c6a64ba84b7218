"""The Triton kernels of lora_linear, on a GPU or in Triton's interpreter."""

import dataclasses
import functools
import importlib
import random

import pytest
import torch

import ctxkern
from ctxkern import registry
from ctxkern.reference import lora_linear_ref
from ctxkern.registry import interpreted
from ctxkern.testing import force
from ctxkern.testing.cases import CASES, Case
from ctxkern.testing.families import lora_arguments
from ctxkern.testing.oracle import check_family, differentiate

pytest.importorskip("triton")
if not ctxkern.backends()["triton"]:
    pytest.skip(str(ctxkern.backends()["triton"]), allow_module_level=True)

from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.tiles import Tile

DEVICE = "cpu" if interpreted() else "cuda"
F16, F32 = torch.float16, torch.float32
# dtypes of x, the adapters and the weight
DTYPES = {"f32": (F32, F32, F32), "f16": (F16, F16, F16), "f16-f32-adapters": (F16, F32, F16)}
if not interpreted():
    BF16 = torch.bfloat16
    DTYPES |= {"bf16": (BF16, BF16, BF16), "bf16-f32-adapters": (BF16, F32, BF16)}
BY_ID = {case.id: case for case in CASES if not case.per_token}
# shapes that differ for this family; the interpreter takes half a second for each
TABLE = ("one", "odd", "prime", "shared-uneven", "no-weight", "table-larger-than-batch", "ragged-shared")
TABLE += ("ragged-empty-sequences", "empty-batch", "empty-sequences", "empty-d-in", "empty-d-out", "empty-packed")
SMALL = Case("small", 5, 3, 18, 21, 1, rows=3, index=(2, 0, -1, 2, 0), bias=True)
SMALL_RAGGED = Case(
    "small-ragged", 5, 0, 18, 21, 1, rows=3, index=(2, 0, -1, 2, 0), lengths=(4, 0, 3, 9, 2), weight=False
)

fn = functools.partial(ctxkern.lora_linear, backend="triton")
everywhere = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
by_layout = pytest.mark.parametrize("case", [SMALL, SMALL_RAGGED], ids=lambda case: case.id)


def made(case, rank, *dtypes, **how):
    arguments, dout = lora_arguments(case, rank, *dtypes, **how)
    return {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}, dout.to(DEVICE)


def check(arguments, dout, where=""):
    check_family(fn, lora_linear_ref, arguments, dout, where)


def assert_same(got, want):
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@everywhere
def test_the_case_table(dtypes):
    for name in TABLE if dtypes[0] is F32 or not interpreted() else TABLE[1:4]:
        check(*made(BY_ID[name], 3, *dtypes), name)


@everywhere
@by_layout
def test_sequences_without_an_adapter(case, dtypes):
    check(*made(case, 3, *dtypes))
    arguments, dout = made(case, 3, *dtypes)
    arguments["adapter_index"] = torch.full((case.B,), -1, device=DEVICE)
    check(arguments, dout, "none at all")


@pytest.mark.parametrize(
    ("rank", "dtypes"), [(0, "f32"), (1, "f16"), (65, "f32"), (130, "f16-f32-adapters"), (256, "f16"), (300, "f16")]
)
def test_ranks(rank, dtypes):
    """One, several launches, each with and without tiles of its own."""
    check(*made(SMALL, rank, *DTYPES[dtypes]))


@by_layout
def test_a_rank_for_each_adapter(case):
    for rank, ranks in ((20, (7, 20, 0)), (70, (66, 70, 17)))[: 2 if case is SMALL else 1]:
        arguments, dout = made(case, rank)
        arguments["ranks"] = torch.tensor(ranks, device=DEVICE)
        check(arguments, dout)
        clean = differentiate(fn, arguments, dout)
        for i, count in enumerate(ranks):
            arguments["A"][i, count:] = arguments["B"][i, :, count:] = float("nan")
        assert_same(differentiate(fn, arguments, dout), clean)
        for i, count in enumerate(ranks):
            assert not clean["dA"][i, count:].any()
            assert not clean["dB"][i, :, count:].any()


@by_layout
def test_a_scale_for_each_adapter(case):
    arguments, dout = made(case, 3)
    del arguments["scale"]
    scale = torch.tensor([0.5, 3.0, -2.0], device=DEVICE)

    def reference(**tensors):
        return lora_linear_ref(**tensors, scale=scale.to(tensors["x"].dtype))

    check_family(functools.partial(fn, scale=scale), reference, arguments, dout)


@everywhere
@by_layout
def test_dropout_by_the_mask_of_the_reference(case, dtypes):
    arguments, dout = made(case, 3, *dtypes)
    for seed, share in ((-5, 0.9), (1 << 62, 0.3)):
        check(arguments | {"dropout": share, "seed": seed}, dout, f"seed {seed}")


def test_the_mask_is_that_of_the_reference_bit_for_bit():
    rows, columns, share = 70, 60, 0.4
    x = torch.ones(1, rows, columns, device=DEVICE)
    eye = torch.eye(columns, device=DEVICE)[None]
    y = ctxkern.lora_linear(x, None, eye, eye, dropout=share, seed=-77, backend="triton")
    assert torch.equal(y[0] > 0, ctxkern.reference.lora_dropout_mask(-77, rows, columns, share).to(DEVICE))


def test_the_numbers_of_a_call_are_not_those_of_the_last():
    arguments, dout = made(SMALL, 3)
    for change in ({"scale": 2.0}, {"dropout": 0.5, "seed": 1}, {"dropout": 0.25, "seed": 1}):
        check(arguments | change, dout, str(change))


@by_layout
def test_each_gradient_alone(case):
    arguments, dout = made(case, 3)
    arguments |= {"dropout": 0.2, "seed": 3}
    everything = differentiate(fn, arguments, dout)
    for result in everything:
        leaf = result[1:]
        if arguments.get(leaf) is not None:
            given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
            (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
            assert torch.equal(alone, everything[result]), result


def test_strided_and_expanded_operands():
    arguments, dout = made(SMALL, 3)
    arguments["A"] = arguments["A"].mT.contiguous().mT
    arguments["B"] = arguments["B"].repeat_interleave(2, -1)[..., ::2]
    arguments["weight"] = arguments["weight"].repeat_interleave(2, 0)[::2]
    arguments["x"] = arguments["x"].mT.contiguous().mT
    check(arguments, dout.mT.contiguous().mT, "strided")
    for name in ("A", "B"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    check(arguments, dout, "expanded")


def _small_tiles():
    return force(tiles={f"lora_{name}": Tile(16, 16, 16, 4, 2) for name in ("y", "dx", "dab")})


LONG = Case("long", 4, 11, 35, 40, 1, rows=3, index=(1, -1, 0, 1))


@everywhere
def test_many_tiles_and_parts(dtypes):
    arguments, dout = made(LONG, 5, *dtypes)
    with _small_tiles():
        check(arguments | {"dropout": 0.3, "seed": 8}, dout)


def test_into_how_many_parts_rows_are_split_changes_no_bit(monkeypatch):
    arguments, dout = made(dataclasses.replace(LONG, S=3), 5)
    with _small_tiles():
        many = differentiate(fn, arguments, dout)
        monkeypatch.setattr(tiles, "PROGRAMS", 1)
        tiles.forget()
        one = differentiate(fn, arguments, dout)
    monkeypatch.undo()
    tiles.forget()
    assert_same(one, many)


def test_other_sequences_change_no_bit():
    arguments, dout = made(dataclasses.replace(LONG, weight=False), 5)
    both = differentiate(fn, arguments, dout)
    assert_same(differentiate(fn, arguments, dout), both)
    index = torch.tensor([1, 1], device=DEVICE)
    part = differentiate(fn, arguments | {"x": arguments["x"][[0, 3]], "adapter_index": index}, dout[[0, 3]])
    for name in ("y", "dx"):
        assert torch.equal(part[name], both[name][[0, 3]]), name
    for name in ("dA", "dB"):
        assert torch.equal(part[name][1], both[name][1]), name


# around multiples of a chunk of 16 rows
CHUNKS = Case("chunks", 6, 0, 18, 21, 1, rows=4, index=(2, 0, 2, 0, 3, 1), lengths=(20, 15, 13, 2, 7, 16), weight=False)


def test_adapters_with_many_rows(monkeypatch):
    """Sums in chunks, which other adapters do not move."""
    from ctxkern.lora.triton import adapters

    monkeypatch.setattr(adapters, "_CHUNK", 16)
    tiles.forget()
    arguments, dout = made(CHUNKS, 5, F16)
    check(arguments, dout)
    whole = differentiate(fn, arguments, dout)
    rows = torch.cat([torch.arange(0, 20), torch.arange(35, 48)])
    alone = {"x": arguments["x"][rows], "adapter_index": torch.tensor([2, 2], device=DEVICE)}
    alone["cu_seqlens"] = torch.tensor([0, 20, 33], dtype=torch.int32, device=DEVICE)
    part = differentiate(fn, arguments | alone, dout[rows])
    monkeypatch.undo()
    tiles.forget()
    for name in ("dA", "dB"):
        assert torch.equal(part[name][2], whole[name][2]), name


@pytest.mark.skipif(not interpreted(), reason="a GPU orders programs as it likes")
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx

    def set_grid_idx(x, y, z):
        nx, ny, nz = builder.grid_dim
        order = random.Random(nx * ny * nz).sample(range(nx * ny * nz), nx * ny * nz)
        at = order[(x * ny + y) * nz + z]
        in_order(at // (ny * nz), at // nz % ny, at % nz)

    arguments, dout = made(dataclasses.replace(LONG, S=7), 5)
    arguments |= {"dropout": 0.3, "seed": 8}
    with _small_tiles():
        want = differentiate(fn, arguments, dout)
        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
        assert_same(differentiate(fn, arguments, dout), want)


@pytest.mark.parametrize(("x", "factor"), [(1e4, 1e-4), (1e-3, 1e-2)], ids=["large", "small"])
def test_what_lies_between_products_leaves_the_range_of_float16(x, factor):
    """x Aᵀ is 50 times the largest float16, or below the smallest normal one; dy B and its products likewise."""
    arguments, dout = made(dataclasses.replace(SMALL, D=64, E=64, weight=False, bias=False), 4, F16)
    for name, by in (("x", x), ("A", 8 if x > 1 else factor), ("B", factor if x > 1 else 1)):
        arguments[name] = arguments[name] * by
    dout = dout * 1e-2
    double = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
    }
    exact = differentiate(lora_linear_ref, double, dout.double())
    for name, value in differentiate(fn, arguments, dout).items():
        error = value.double() - exact[name]
        band = torch.finfo(F16).eps * exact[name].abs() + torch.finfo(F16).smallest_normal * torch.finfo(F16).eps
        worst = torch.finfo(F16).eps * exact[name].square().mean().sqrt()
        assert (error.abs() <= 2 * (band + worst)).all(), (name, error.abs().max(), exact[name].abs().max())


@pytest.mark.parametrize("factor", [1e-3, 1e-6], ids=str)
def test_small_float32_adapters_next_to_float16(factor):
    arguments, dout = made(dataclasses.replace(SMALL, weight=False, bias=False), 4, F16, F32, scale=0.5 / factor)
    arguments["A"] = arguments["A"] * factor
    exact_of = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
    }
    exact = differentiate(lora_linear_ref, exact_of, dout.double())
    for name, value in differentiate(fn, arguments, dout).items():
        error = (value.double() - exact[name]).norm()
        assert error <= torch.finfo(F16).eps * exact[name].norm(), name


@pytest.mark.parametrize("gate_rows", [2, None], ids=["indexed", "a row each"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_gates(gate_rows, dtype):
    """y = x W + ((x Aᵀ) ∘ gate) Bᵀ with one adapter for all rows."""
    from ctxkern.lora.operands import Gates, Gradients, Operands, Options

    backend = importlib.import_module("ctxkern.lora.triton")
    arguments, dout = made(Case("gates", 1, 70, 18, 21, 1), 5, dtype)
    x, weight, A, B = (arguments[name] for name in ("x", "weight", "A", "B"))
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(gate_rows or 70, 5, generator=generator).to(DEVICE)
    rows = None if gate_rows is None else (torch.arange(70, device=DEVICE) * 7 // 3) % gate_rows
    operands, options = Operands(x, weight, A, B, None), Options(1 << 20, None, 1.0, 0.0)
    gates = Gates(values, rows, torch.full((70, 5), float("nan"), device=DEVICE))
    given = backend.backward(dout, operands, options, Gradients(True, True, True, True, False), gates)
    got = {
        "y": backend.forward(operands, options, gates),
        **dict(zip(("dx", "dweight", "dA", "dB"), given, strict=False)),
    }
    got["dgates"] = gates.products

    def reference(x, weight, A, B, gates):
        return ((x @ A.mT) * gates) @ B.mT + x @ weight.mT

    each = values if rows is None else values[rows]
    tensors = {"x": x, "weight": weight, "A": A, "B": B, "gates": each}
    exact = differentiate(reference, {n: t.double() for n, t in tensors.items()}, dout.double())
    for name, value in got.items():
        error, size = (value.double() - exact[name]).norm(), exact[name].norm()
        assert error <= 4 * torch.finfo(dtype).eps * size, (name, error, size)


def test_operators():
    arguments, dout = made(SMALL_RAGGED, 3)
    tensors = [arguments[name] for name in ("x", "weight", "A", "B", "bias")]
    scales, ranks, seed = torch.ones(3), torch.tensor([2, 3, 0]), torch.tensor(3)
    constants = [t.to(DEVICE) for t in (scales, ranks, seed)]
    operands = (*tensors, *constants, arguments["adapter_index"], arguments["cu_seqlens"], 1 << 12, "triton", 0.5, 0.5)
    torch.library.opcheck(torch.ops.ctxkern.lora_forward.default, operands)
    needs = [t is not None for t in tensors]
    torch.library.opcheck(torch.ops.ctxkern.lora_backward.default, (dout, *operands, needs))


@pytest.mark.parametrize("damage", ["A of a neighbour", "y of the base alone", "another seed", "g in another order"])
def test_wrong_results_are_noticed(damage, monkeypatch):
    from ctxkern.runtime.triton import launches

    launched = launches.Launches.run

    def run(self, tensors, device):
        x, A, B, scales, ranks, seed, *others = tensors
        if damage == "y of the base alone":
            return
        if damage == "A of a neighbour":
            A = A.roll(1, 0)
        elif damage == "another seed":
            seed = seed + 1
        else:
            x = x.flip(1)
        launched(self, [x, A, B, scales, ranks, seed, *others], device)

    arguments, dout = made(SMALL, 3)
    arguments |= {"dropout": 0.3, "seed": 8}
    check(arguments, dout)
    monkeypatch.setattr(launches.Launches, "run", run)
    with pytest.raises(AssertionError, match="y: rms error"):
        check(arguments, dout)


@pytest.mark.skipif(not interpreted(), reason="a GPU asserts on the device, which ends the process")
def test_values_are_checked():
    arguments, _ = made(SMALL, 3)
    with pytest.raises(ValueError, match=r"adapter_index\[0\] is 3"):
        fn(**arguments | {"adapter_index": torch.tensor([3, 0, 0, 0, 0])})
    with pytest.raises(ValueError, match=r"adapter_index\[0\] is -2"):
        fn(**arguments | {"adapter_index": torch.tensor([-2, 0, 0, 0, 0])})
    with pytest.raises(ValueError, match=r"ranks\[1\] is 4"):
        fn(**arguments | {"ranks": torch.tensor([0, 4, 0])})


WRONG = {
    "adapter_index": ([3, 0, 0, 0, 0], "an index lies outside"),
    "ranks": ([0, 3, 4], "ranks lies outside"),
    "ranks below zero": ([0, -1, 3], "ranks lies outside"),
}


@pytest.mark.skipif(not interpreted(), reason="a GPU asserts on the device, which ends the process")
@pytest.mark.parametrize("name", WRONG)
def test_kernels_check_what_the_call_cannot_read(name, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    backend = importlib.import_module("ctxkern.lora.triton")
    monkeypatch.setattr(backend, "check_values", lambda _: None)
    values, message = WRONG[name]
    arguments, _ = made(SMALL, 3)
    wrong = arguments | {name.split()[0]: torch.tensor(values)}
    # assertions are of a kernel's debug option, which the interpreter has for all
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    fn(**arguments | {"ranks": torch.tensor([0, 3, 2])})
    with pytest.raises(Exception, match=message):
        fn(**wrong)


def test_ranks_beyond_the_adapters_read_and_write_nothing_else(monkeypatch):
    """What a device does meanwhile that stops at them."""
    monkeypatch.setattr(importlib.import_module("ctxkern.lora.triton"), "check_values", lambda _: None)
    arguments, dout = made(SMALL, 3)
    ranks = [torch.tensor(each, device=DEVICE) for each in ([1 << 20, 2, -5], [3, 2, 0])]
    got, want = (differentiate(fn, arguments | {"ranks": each}, dout) for each in ranks)
    assert_same(got, want)


def test_a_gpu_takes_it_by_default(monkeypatch):
    monkeypatch.setitem(registry.statuses, "triton", registry.Status("available"))
    monkeypatch.setitem(registry._ON_CPU, "triton", lambda: False)
    monkeypatch.setattr(registry, "_too_old", lambda device: "")
    assert registry._best(torch.device("cuda", 0), F32, "lora") == "triton"

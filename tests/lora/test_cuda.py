"""The CUDA C++ kernels of lora_linear, compiled for the CPU by an emulation header."""

import functools

import pytest
import torch
from helpers.emulated import compiled, emulated, forget, planted, without_dtype

import ctxkern
from ctxkern.lora import cuda as lora_cuda
from ctxkern.lora.operands import Gradients, Operands, Options
from ctxkern.reference import lora_linear_ref
from ctxkern.runtime import cuda as cuda_runtime
from ctxkern.testing.cases import CASES, Case
from ctxkern.testing.families import lora_arguments
from ctxkern.testing.oracle import check_family, differentiate

DTYPES = {
    "f32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16, torch.float16),
    "bf16-f32-adapters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "f16-f32-adapters": (torch.float16, torch.float32, torch.float16),
    "f32-bf16-adapters": (torch.float32, torch.bfloat16, torch.float32),
}
BY_ID = {case.id: case for case in CASES}
# what says something of its own here; the bilinear's layouts do not
TABLE = [
    BY_ID[name]
    for name in (
        *("one", "odd", "prime", "single-context", "shared-uneven", "table-larger-than-batch", "no-weight", "decode"),
        *("ragged", "ragged-empty-sequences", "ragged-shared", "strided-x", "expanded-x", "empty-batch"),
        *("empty-sequences", "empty-d-in", "empty-d-out", "empty-packed"),
    )
]
LARGE = ("prime", "single-context", "decode")

fn = functools.partial(ctxkern.lora_linear, backend="cuda")
some = pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared", "no-weight"])
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module", autouse=True)
def library():
    with emulated() as path:
        yield path


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_case_table(dtypes):
    for case in TABLE:
        if case.id not in LARGE or dtypes in ("f32", "bf16"):
            arguments, dout = lora_arguments(case, 3, *DTYPES[dtypes])
            check_family(fn, lora_linear_ref, arguments, dout, case.id)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
def test_ranks(dtypes):
    """Around the sizes of tiles, and more than shared memory holds at once."""
    for rank, name in (
        (0, "odd"),
        (0, "no-weight"),
        (1, "odd"),
        (16, "shared-uneven"),
        (33, "odd"),
        (65, "ragged-shared"),
    ):
        arguments, dout = lora_arguments(BY_ID[name], rank, *DTYPES[dtypes])
        check_family(fn, lora_linear_ref, arguments, dout, f"{name}, rank {rank}")
    for weight in (True, False):
        case = Case("rank", 2, 5, 24, 40, 1, weight=weight)
        arguments, dout = lora_arguments(case, 300, *DTYPES[dtypes])
        check_family(fn, lora_linear_ref, arguments, dout, "rank 300")


CHUNKS = Case("chunks-shared", 6, 0, 24, 16, 1, rows=3, index=(2, 0, 2, -1, 2, 1), lengths=(260, 9, 255, 3, 7, 257))
# rows, columns and ranks beyond one tile; columns in turn by one block, and by several
SIZES = [
    (Case("tiles", 2, 130, 72, 136, 1, bias=True), 16),
    (Case("tiles-and-less", 2, 67, 161, 141, 1, rows=3, index=(2, 0)), 40),
    (Case("parts-of-columns", 1, 3, 300, 600, 1), 8),
    (Case("few-columns", 2, 5, 140, 3, 1, weight=False), 8),
    # sums over rows in chunks of 256: of one sequence, of several, a row more than a chunk and none
    (Case("chunks", 1, 300, 24, 16, 1), 3),
    (Case("chunks-packed", 2, 0, 24, 16, 1, lengths=(256, 257), bias=True), 33),
    (CHUNKS, 3),
    # empty sequences count as tiles, as how long they are is known on the device alone
    (Case("columns-in-turn", 140, 0, 300, 300, 1, lengths=(0,) * 138 + (5, 9)), 3),
]


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16-f32-adapters"])
@pytest.mark.parametrize(("case", "rank"), SIZES, ids=[case.id for case, _ in SIZES])
def test_sizes(case, rank, dtypes):
    if case.id in ("columns-in-turn", "chunks", "chunks-packed") and dtypes != "bf16":
        pytest.skip("the same in every dtype")
    arguments, dout = lora_arguments(case, rank, *DTYPES[dtypes])
    check_family(fn, lora_linear_ref, arguments, dout)


@some
@halves
class TestOptions:
    def test_sequences_without_an_adapter(self, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        bounds, rows = arguments["cu_seqlens"], len(arguments["A"])
        sequences = len(arguments["x"]) if bounds is None else len(bounds) - 1
        for index in ([-1] * sequences, [(b % (rows + 1)) - 1 for b in range(sequences)]):
            arguments["adapter_index"] = torch.tensor(index)
            check_family(fn, lora_linear_ref, arguments, dout, str(index))

    def test_a_rank_and_a_scale_for_each_adapter(self, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 20, dtype)
        del arguments["scale"]
        count = len(arguments["A"])
        fixed = {"ranks": torch.tensor([(0, 20, 7, 16, 17, 1)[i % 6] for i in range(count)])}
        scale = torch.randn(count, generator=torch.Generator().manual_seed(0))

        def reference(**tensors):
            return lora_linear_ref(**tensors, scale=scale.to(tensors["x"].dtype))

        scaled = functools.partial(fn, scale=scale)
        check_family(scaled, reference, arguments | fixed, dout)
        # what lies behind a rank is not read
        clean = differentiate(scaled, arguments | fixed, dout)
        for i, rank in enumerate(fixed["ranks"]):
            arguments["A"][i, rank:] = arguments["B"][i, :, rank:] = float("nan")
        for result, value in differentiate(scaled, arguments | fixed, dout).items():
            assert torch.equal(value, clean[result]), result

    def test_dropout_by_the_mask_of_the_reference(self, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        for seed in (0, -5, 1 << 62):
            check_family(fn, lora_linear_ref, arguments | {"dropout": 0.3, "seed": seed}, dout)

    def test_each_gradient_alone(self, dtype, name):
        arguments, dout = lora_arguments(BY_ID[name], 3, dtype)
        arguments |= {"dropout": 0.2, "seed": 3}
        everything = differentiate(fn, arguments, dout)
        for result in everything:
            leaf = result[1:]
            if arguments.get(leaf) is not None:
                given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
                (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
                assert torch.equal(alone, everything[result]), result


@pytest.mark.parametrize("dtypes", DTYPES)
def test_strided_adapters(dtypes):
    arguments, dout = lora_arguments(BY_ID["odd"], 3, *DTYPES[dtypes])
    arguments["A"] = arguments["A"].mT.contiguous().mT
    arguments["B"] = arguments["B"].repeat_interleave(2, -1)[..., ::2]
    check_family(fn, lora_linear_ref, arguments, dout.mT.contiguous().mT)
    for name in ("A", "B"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    check_family(fn, lora_linear_ref, arguments, dout)


@halves
def test_other_sequences_and_orders_of_threads_change_no_bit(dtype, monkeypatch):
    case = Case("batch", 7, 70, 40, 24, 1, rows=4, index=(0, 1, 2, 3, 0, 2, 3), weight=False)
    arguments, dout = lora_arguments(case, 8, dtype)
    first = differentiate(fn, arguments, dout)
    monkeypatch.setenv("CTXKERN_EMULATE_SEED", "7")
    again = differentiate(fn, arguments, dout)
    alone = [b for b, u in enumerate(case.index) if u == 2]
    picked = arguments | {"x": arguments["x"][alone], "adapter_index": torch.tensor([2, 2])}
    part = differentiate(fn, picked, dout[alone])
    for name, value in first.items():
        assert torch.equal(again[name], value), name
        rows = 2 if name in ("dA", "dB") else alone
        assert torch.equal(part[name][2 if rows == 2 else slice(None)], value[rows]), name


def test_other_sequences_change_no_bit_of_sums_in_chunks():
    case = Case("chunks", 5, 0, 24, 16, 1, rows=3, index=(2, 0, 2, 1, 2), lengths=(100, 70, 200, 40, 20), weight=False)
    arguments, dout = lora_arguments(case, 3)
    whole = differentiate(fn, arguments, dout)
    rows = torch.cat([torch.arange(0, 100), torch.arange(170, 370), torch.arange(410, 430)])
    alone = {"x": arguments["x"][rows], "adapter_index": torch.tensor([2, 2, 2])}
    alone["cu_seqlens"] = torch.tensor([0, 100, 300, 320], dtype=torch.int32)
    part = differentiate(fn, arguments | alone, dout[rows])
    for name in ("dA", "dB"):
        assert torch.equal(part[name][2], whole[name][2]), name


@pytest.mark.parametrize("rank", [3, 64])
def test_sums_of_chunks_take_no_more_memory_than_x_and_dy(monkeypatch, rank):
    class CountedError(Exception):
        pass

    def workspace(size, device, what):
        raise CountedError(size)

    monkeypatch.setattr(cuda_runtime, "_workspace", workspace)
    x = torch.empty(1, 50_000, 128, dtype=torch.bfloat16)
    A, B = x.new_empty(1, rank, 128), x.new_empty(1, 96, rank)
    needs = Gradients(False, False, True, True, False)
    with pytest.raises(CountedError) as counted:
        lora_cuda.backward(x.new_empty(1, 50_000, 96), Operands(x, None, A, B, None), Options(0, None, 1.0, 0.0), needs)
    (size,), held = counted.value.args, 2 * 50_000 * rank * 2
    assert held + 4096 < size <= held + 50_000 * (128 + 96) * 2 + 4096 * rank


@pytest.mark.parametrize(("inner", "outer"), [(1e3, 1e-3), (1e-6, 1e3)], ids=["large", "small"])
@pytest.mark.parametrize("dtypes", ["f16", "f16-f32-adapters"])
def test_inner_products_beyond_the_range_of_float16(dtypes, inner, outer):
    """h and g overflow, or are subnormal, where y, dx, dA and dB are not."""
    case = Case("range", 2, 9, 33, 20, 1, weight=False)
    arguments, dout = lora_arguments(case, 5, *DTYPES[dtypes])
    arguments["x"], dout = arguments["x"] * 200, dout * (200 if inner > 1 else 1)
    arguments |= {"A": arguments["A"] * inner, "B": arguments["B"] * inner, "scale": outer / inner}
    double = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    exact = differentiate(lora_linear_ref, double, dout)
    for name, value in differentiate(fn, arguments, dout).items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        usual = exact[name].abs().max() < 6e4 and exact[name].abs().median() > 1e-3
        assert error < 2**-9 or not usual, (name, error)


def test_float32_is_rounded_to_tf32_where_torch_is_told_so():
    arguments, dout = lora_arguments(Case("tf32", 2, 30, 24, 40, 1), 8)
    exact = differentiate(
        lora_linear_ref, {n: t if n == "scale" or t is None else t.double() for n, t in arguments.items()}, dout
    )
    try:
        torch.set_float32_matmul_precision("high")
        rounded = differentiate(fn, arguments, dout)
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in ("dA", "dB"):
        error = (rounded[name].double() - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < error < 4 * 2**-11, (name, error)


def test_what_cannot_run_says_so():
    arguments, _ = lora_arguments(BY_ID["odd"], 3)
    with pytest.raises(ValueError, match=r"adapter_index\[1\] is 5"):
        fn(**arguments | {"adapter_index": torch.tensor([0, 5, 1])})
    with pytest.raises(ValueError, match=r"ranks\[2\] is 4"):
        fn(**arguments | {"ranks": torch.tensor([0, 3, 4])})


@pytest.mark.parametrize("wrong", [{"adapter_index": torch.tensor([0, 3, 1])}, {"ranks": torch.tensor([0, 3, 4])}])
def test_kernels_check_what_the_call_cannot_read(monkeypatch, wrong):
    monkeypatch.setattr(lora_cuda, "check_values", lambda _: None)
    arguments, _ = lora_arguments(BY_ID["odd"], 3)
    message = r"lora_forward on backend 'cuda' \(x \[3, 5, 7\].*A \[3, 3, 7\]\) failed: .* outside"
    with pytest.raises(RuntimeError, match=message):
        fn(**arguments | wrong)


def test_a_launch_that_fails_names_operator_shape_and_cause(monkeypatch):
    arguments, _ = lora_arguments(BY_ID["odd"], 3)
    without_dtype(monkeypatch, lora_cuda)
    with pytest.raises(RuntimeError, match=r"lora_forward on backend 'cuda' \(x \[3, 5, 7\].*failed: an unknown dtype"):
        fn(**arguments)


KERNELS, GRADIENTS = "cuda/lora/kernels.h", "cuda/lora/gradients.h"
PLANTED = {
    "nothing": (KERNELS, "constexpr int kMostHeld = 256;", "constexpr int kMostHeld = 256 + 0;"),
    "the neighbour's adapter": (KERNELS, "slot * st[0] + r * st[1]", "(slot ? slot - 1 : slot) * st[0] + r * st[1]"),
    "the neighbour's B": (KERNELS, "slot * st[0] + r * st[2]", "(slot ? slot - 1 : slot) * st[0] + r * st[2]"),
    "no barrier before h is read": (
        KERNELS,
        "    __syncthreads();\n    const Strided<S, C, true> b",
        "    const Strided<S, C, true> b",
    ),
    "no barrier before g is read": (
        KERNELS,
        "    __syncthreads();\n    const Strided<S, C, false> a",
        "    const Strided<S, C, false> a",
    ),
    "dropout of the next column": ("cuda/lora/operands.h", "kept(column + begin + i)", "kept(column + begin + i + 1)"),
    "no dropout of dx": (KERNELS, "part.begin, part.end, dropout_of(q)}", "part.begin, part.end, {0, 0}}"),
    "a column of each part is left out": (
        KERNELS,
        "least(begin + columns, width)}",
        "least(begin + columns, width - 1)}",
    ),
    "a row of each adapter is left out": (GRADIENTS, "chunk.begin, rows, columns}", "chunk.begin, rows - 1, columns}"),
    "ranks that an adapter has not": (GRADIENTS, "ranks = adapter.rank - r0", "ranks = least(T::kN, q.rank) - r0"),
    "the last chunk is left out": (GRADIENTS, "w <= last; ++w", "w < last; ++w"),
    "a chunk over another's": (GRADIENTS, "(2 * (begin / rows) + 1)", "(2 * (begin / rows))"),
    "sums of the neighbour": (GRADIENTS, "slot * of_b + i - of_a", "slot * of_b + (i - of_a) / 2"),
}


def _check():
    index = torch.tensor([3, -1, 3, 1, 3, 0, -1, 3])
    options = {"adapter_index": index, "dropout": 0.3, "seed": 4, "ranks": torch.tensor([3, 2, 3, 2])}
    arguments, dout = lora_arguments(BY_ID["shared-uneven"], 3, torch.bfloat16)
    check_family(fn, lora_linear_ref, arguments | options, dout)
    arguments, dout = lora_arguments(CHUNKS, 3, torch.bfloat16)
    check_family(fn, lora_linear_ref, arguments, dout)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_caught(name, tmp_path, monkeypatch):
    sources = planted(tmp_path, *PLANTED[name])
    monkeypatch.setenv("CTXKERN_CUDA_LIBRARY", str(compiled(tmp_path, sources=sources, changed="lora")))
    forget()
    if name == "nothing":
        _check()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            _check()
    monkeypatch.undo()
    forget()

"""The base product of low-rank layers on the CPU: torch's, ours, and ours along with the update."""

import functools

import pytest
import torch
from helpers.threads import the_same_by

import ctxkern
from ctxkern.lora import base
from ctxkern.lora import cpu as lora_cpu
from ctxkern.reference import factored_modulated_linear_ref, lora_linear_ref
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.testing.cases import Case
from ctxkern.testing.families import LOW_RANK_CASES, factored_arguments, lora_arguments
from ctxkern.testing.force import force
from ctxkern.testing.oracle import check_family, differentiate

pytestmark = pytest.mark.skipif(not ctxkern.backends()["cpu"], reason=str(ctxkern.backends()["cpu"]))
on_cpu = functools.partial(ctxkern.lora_linear, backend="cpu")


def with_base(fn, weight, bias):
    """fn with a frozen base, in the dtype of x."""
    return lambda x, **given: fn(x, weight.to(x.dtype), bias=None if bias is None else bias.to(x.dtype), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_by_our_own_product(dtype, monkeypatch):
    product, calls = lora_cpu.modulated.forward, []
    monkeypatch.setattr(lora_cpu.modulated, "forward", lambda *args: calls.append(1) or product(*args))
    for case in (*LOW_RANK_CASES, Case("many-rows", 3, 150, 70, 90, 1, bias=True)):
        arguments, dout = lora_arguments(case, 3, dtype)
        weight = arguments["weight"]
        for given in (weight, weight if weight is None else weight.mT.contiguous().mT):
            with force(library=False):
                check_family(on_cpu, lora_linear_ref, arguments | {"weight": given}, dout, case.id)
    assert bool(calls) == (dtype is torch.float32)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32, torch.bfloat16)],
    ids=["f32", "bf16", "mixed"],
)
@pytest.mark.parametrize("leaves", [("x", "A", "B"), ("A", "B"), ("x",), ("B",)], ids=" ".join)
@pytest.mark.parametrize("library", [None, False], ids=["chosen", "ours"])
def test_a_frozen_base(dtypes, leaves, library):
    for case in LOW_RANK_CASES:
        arguments, dout = lora_arguments(case, 3, *dtypes)
        found = []
        for trained in (leaves, (*leaves, "weight")):
            wanted = [name for name in trained if arguments[name] is not None]
            given = arguments | {name: arguments[name].detach().requires_grad_() for name in wanted}
            with force(library=library):
                y = on_cpu(**given)
                grads = torch.autograd.grad(y, [given[name] for name in wanted], dout)
            found.append([y, *grads[: len(leaves)]])
        for frozen, everything in zip(*found, strict=True):
            assert torch.equal(frozen, everything), case.id


ALONG = [
    Case("many-rows", 3, 150, 70, 90, 1, bias=True),
    Case("pages-apart", 2, 40, 1024, 64, 1, bias=True),
    Case("pages-apart-out", 2, 40, 64, 1024, 1),
    Case("shared", 6, 50, 96, 80, 1, rows=3, index=(0, 1, 2, 0, 1, 2), bias=True),
    Case("ragged", 3, 0, 33, 47, 1, lengths=(40, 0, 300)),
    Case("long-sums", 1, 513, 785, 391, 1),
    Case("long-sums-shared", 4, 40, 1090, 70, 1, rows=2, index=(0, 1, 0, 1), bias=True),
]


@pytest.mark.parametrize("isa", cpu_runtime.cpu_isas() or [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALONG, ids=[case.id for case in ALONG])
def test_the_base_along_with_the_update(case, dtype, isa):
    if dtype is torch.bfloat16 and not isa.endswith("bf16"):
        pytest.skip("the words of this set are float32")
    arguments, dout = lora_arguments(case, 5, dtype)
    weight, bias = arguments.pop("weight"), arguments.pop("bias")
    with force(library=False, isa=isa):
        for given in (weight, weight.mT.contiguous().mT):
            planned = ctxkern.explain_lora(weight=given, bias=bias, **arguments)
            assert planned.base.endswith("with the update")
            fn = with_base(on_cpu, given, bias)
            check_family(fn, with_base(lora_linear_ref, weight, bias), arguments, dout, case.id)
            check_family(on_cpu, lora_linear_ref, arguments | {"weight": given, "bias": bias}, dout, case.id)
            the_same_by((1, 3, 8), functools.partial(differentiate, fn, arguments, dout))
            uneven = arguments | {"ranks": torch.arange(len(arguments["A"])) * 2 % 5}
            check_family(fn, with_base(lora_linear_ref, weight, bias), uneven, dout, case.id)


@pytest.mark.parametrize("isa", [isa for isa in cpu_runtime.cpu_isas() or [] if isa.endswith("bf16")])
def test_a_base_along_with_the_update_is_rounded_first(isa):
    """As one that was written before: a batch in which it goes along, and one too small for that, give the same y but
    where sums of float32 in another order, D·2⁻²⁴ apart, lie on both sides of a boundary of bfloat16, 2⁻⁸ apart."""
    case = Case("rounded", 3, 150, 256, 128, 1)
    arguments, dout = lora_arguments(case, 16, torch.bfloat16)
    fn, found = with_base(on_cpu, arguments.pop("weight"), arguments.pop("bias")), []
    for library in (False, True):
        with force(library=library, isa=isa):
            found.append(differentiate(fn, arguments, dout))
    for name, terms in (("y", case.D), ("dx", case.E)):
        along, before = (results[name] for results in found)
        assert (along != before).float().mean() <= terms * 2**-16, name


@pytest.mark.parametrize(
    ("dtype", "rows", "d", "along"),
    [
        (torch.bfloat16, 16, 512, True),
        (torch.bfloat16, 16, 1024, False),
        (torch.bfloat16, 20, 1024, True),
        (torch.bfloat16, 32, 2048, False),
        (torch.bfloat16, 48, 2048, True),
        (torch.bfloat16, 48, 2112, False),
        (torch.float32, 16, 1024, True),
        (torch.float32, 15, 1024, False),
        (torch.float32, 64, 1056, False),
    ],
    ids=str,
)
def test_a_base_goes_along_where_blocks_are_long_enough_for_it(dtype, rows, d, along):
    isa = cpu_runtime.cpu_isas()[-1]
    if dtype is torch.bfloat16 and not isa.endswith("bf16"):
        pytest.skip("the words of this set are float32")
    x, weight, A, B = (torch.zeros(shape, dtype=dtype) for shape in ((2, rows, d), (d, d), (2, 1, d), (2, d, 1)))
    with force(library=False, isa=isa):
        planned = ctxkern.explain_lora(x, weight, A, B)
    assert planned.base.endswith("with the update") == along


ONE_ADAPTER = [
    Case("one", 3, 150, 300, 150, 1, rows=1, index=(0, 0, 0), bias=True),
    Case("ragged", 3, 0, 33, 47, 1, rows=1, index=(0, 0, 0), lengths=(40, 0, 301)),
    Case("long-sums", 1, 513, 785, 391, 1),
]


@pytest.mark.parametrize("isa", cpu_runtime.cpu_isas() or [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ONE_ADAPTER, ids=[case.id for case in ONE_ADAPTER])
def test_the_gradient_of_the_base_along_with_those_of_one_adapter(case, dtype, isa, weights_made):
    if dtype is torch.bfloat16 and not isa.endswith("bf16"):
        pytest.skip("the words of this set are float32")
    arguments, dout = lora_arguments(case, 7, dtype)
    weight = arguments["weight"]
    with force(library=False, isa=isa):
        for given in (weight, weight.mT.contiguous().mT):
            everything = arguments | {"weight": given}
            check_family(on_cpu, lora_linear_ref, everything, dout, case.id)
            found = the_same_by((1, 3, 8), functools.partial(differentiate, on_cpu, everything, dout))
            leaf = given.detach().requires_grad_()
            (alone,) = torch.autograd.grad(on_cpu(**everything | {"weight": leaf}), leaf, dout)
            assert torch.equal(alone, found["dweight"])
            assert alone.stride() == given.stride()
    assert weights_made == {True}


@pytest.mark.parametrize(
    "change",
    [{"adapter_index": torch.tensor([0, -1, 2])}, {"x": torch.ones(3, 40, 70)[:, :, ::7]}, {"x": torch.ones(3, 2, 10)}],
    ids=["a sequence without an adapter", "rows with gaps", "few rows"],
)
def test_the_base_by_itself(change):
    arguments, _ = lora_arguments(Case("rows", 3, 40, 10, 6, 1), 3)
    arguments |= change
    weight, bias = arguments.pop("weight"), arguments.pop("bias")
    dout = torch.ones(*arguments["x"].shape[:2], 6)
    with force(library=False):
        assert ctxkern.explain_lora(weight=weight, bias=bias, **arguments).base == "a product of C++ in float32"
        check_family(*(with_base(fn, weight, bias) for fn in (on_cpu, lora_linear_ref)), arguments, dout)
        check_family(on_cpu, lora_linear_ref, arguments | {"weight": weight, "bias": bias}, dout)


@pytest.fixture
def taken(monkeypatch):
    """How each base product of ours since was made, in the words of `explain_lora`."""
    found, core, product = [], cpu_runtime.load(), lora_cpu.modulated.forward

    class Core:
        def __getattr__(self, name):
            return getattr(core, name)

        def lora_forward(self, operands, *given):
            return self.noted(core.lora_forward(operands, *given), operands, given[3])

        def lora_backward(self, dout, operands, *given):
            return self.noted(core.lora_backward(dout, operands, *given), operands, given[4])

        def noted(self, result, operands, along):
            if result is not None and along and core.lora_along(operands):
                found.append("with the update")
            return result

    monkeypatch.setattr(lora_cpu.cpu_runtime, "load", Core)
    monkeypatch.setattr(lora_cpu.modulated, "forward", lambda *given: found.append("by itself") or product(*given))
    return found


@pytest.fixture
def weights_made(monkeypatch):
    """Whether each backward since that was asked for it made the gradient of the base weight itself."""
    found, core = set(), cpu_runtime.load()

    class Core:
        def __getattr__(self, name):
            return getattr(core, name)

        def lora_backward(self, dout, operands, needs, *given):
            grads = core.lora_backward(dout, operands, needs, *given)
            if needs.weight:
                found.add(grads is not None and grads[1] is not None)
            return grads

    monkeypatch.setattr(lora_cpu.cpu_runtime, "load", Core)
    return found


GATED = [
    Case("many-rows", 3, 150, 70, 90, 8, bias=True),
    Case("shared", 6, 50, 96, 80, 8, rows=3, index=(0, 1, 2, 0, 1, 2), bias=True),
    Case("ragged", 3, 0, 33, 47, 8, lengths=(40, 0, 300)),
    Case("context-per-token", 2, 40, 64, 96, 8, per_token=True),
]


@pytest.mark.parametrize("isa", cpu_runtime.cpu_isas() or [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GATED, ids=[case.id for case in GATED])
def test_gates_along_with_the_base(case, dtype, isa, taken):
    arguments, dout = factored_arguments(case, 5, dtype)
    fn = functools.partial(ctxkern.factored_modulated_linear, backend="cpu")
    with force(library=False, isa=isa):
        for weight in (arguments["weight"], arguments["weight"].mT.contiguous().mT):
            check_family(fn, factored_modulated_linear_ref, arguments | {"weight": weight}, dout, case.id)
    assert set(taken) == ({"with the update"} if dtype is torch.float32 or isa.endswith("bf16") else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("sizes", [(3, 100, 32, 256), (3, 100, 256, 32), (3, 100, 256, 256), (3, 9, 256, 256)], ids=str)
def test_what_is_explained_is_what_runs(sizes, trained, dtype, taken, monkeypatch):
    if dtype is torch.bfloat16 and not cpu_runtime.cpu_isa().endswith("bf16"):
        pytest.skip("the words of this machine are float32")
    monkeypatch.setattr(base, "_is_measured", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    arguments, dout = lora_arguments(Case("sizes", *sizes, 1), 3, dtype)
    for name in ("x", "A", "B", *["weight"] * trained):
        arguments[name].requires_grad_()
    planned = [ctxkern.explain_lora(**arguments, backward=backward).base for backward in (False, True)]
    ctxkern.lora_linear(**arguments).backward(dout)
    ours = [text for text in planned if text.startswith("a product of C++")]
    assert taken == ["with the update" if text.endswith("with the update") else "by itself" for text in ours]


def test_our_own_product_is_taken_where_it_is_faster(monkeypatch):
    taken = [256, 128, torch.float32], [1024, 4096, torch.float32, torch.float32]
    refused = [255, 128, torch.float32], [1024, 63, torch.float32], [1024, 1024, torch.float32, torch.bfloat16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name, there in (("AMD EPYC 9654", True), ("INTEL(R) XEON(R)", False)):
        monkeypatch.setattr(base.cpu, "cpu_name", lambda name=name: name)
        monkeypatch.setattr(base.cpu, "cpu_isa", lambda: "avx512")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        base._is_measured.cache_clear()
        assert [base.own_on_cpu(*given) for given in (*taken, *refused)] == [(there, there)] * 2 + [(False, False)] * 3
        assert base.own_on_cpu(1024, 127, torch.float32) == (False, there)
        assert base.own_on_cpu(256, 128, torch.bfloat16) == (False, False)
        monkeypatch.setattr(base.cpu, "cpu_isa", lambda: "avx512_bf16")
        assert base.own_on_cpu(256, 128, torch.bfloat16) == (False, there)
    base._is_measured.cache_clear()

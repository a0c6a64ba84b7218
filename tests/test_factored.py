"""factored_modulated_linear: against the oracle, and as modulated_linear with the tensor its factors stand for."""

import functools

import pytest
import torch
from helpers.backends import best, everywhere, on
from helpers.threads import the_same_by

import ctxkern
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.testing.cases import CASES, Case
from ctxkern.testing.families import factored_arguments
from ctxkern.testing.measure import peak_extra_bytes
from ctxkern.testing.oracle import check_family, differentiate

DTYPES = {
    "f32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "f16": (torch.float16, None),
    "f64": (torch.float64, None),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
}
BY_ID = {case.id: case for case in CASES}


@pytest.fixture
def fn(request):
    with on(request.param, ctxkern.factored_modulated_linear) as fn:
        yield fn


@everywhere
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_case_table(fn, dtypes):
    if dtypes[0] is torch.float64:
        fn = functools.partial(ctxkern.factored_modulated_linear, backend="portable")
    for case in CASES:
        if case.id not in ("deep", "debug", "wide-k"):
            arguments, dout = factored_arguments(case, 3, *dtypes)
            check_family(fn, factored_modulated_linear_ref, arguments, dout, case.id)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks(fn, dtype):
    for rank in (0, 1, 2, 17, 64, 130):
        for name in ("odd", "shared-uneven", "ragged-shared", "context-per-token"):
            arguments, dout = factored_arguments(BY_ID[name], rank, dtype)
            check_family(fn, factored_modulated_linear_ref, arguments, dout, f"{name}, rank {rank}")


@best
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_and_strided_factors(fn, dtype):
    case = Case("long", 3, 300, 96, 160, 8, rows=2, index=[1, 0, 1])
    arguments, dout = factored_arguments(case, 24, dtype)
    turned = ("x", "context", "weight", "in_factor", "context_factor", "out_factor")
    arguments |= {name: arguments[name].mT.contiguous().mT for name in turned}
    check_family(fn, factored_modulated_linear_ref, arguments, dout)


@best
@pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared", "context-per-token", "no-weight"])
def test_each_gradient_alone(fn, name):
    arguments, dout = factored_arguments(BY_ID[name], 3)
    everything = differentiate(fn, arguments, dout)
    for result in everything:
        leaf = result[1:]
        if leaf in arguments and arguments[leaf] is not None:
            given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
            (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
            assert torch.equal(alone, everything[result]), result


@best
def test_threads_and_other_sequences_change_no_bit(fn):
    case = Case("batch", 9, 70, 96, 80, 8, rows=4, index=[0, 1, 2, 3, 0, 1, 2, 3, 0])
    arguments, dout = factored_arguments(case, 8)
    on_cpu = fn.keywords["backend"] == "cpu"
    names = ("y", "dx", "dcontext", "din_factor", "dcontext_factor", "dout_factor") if on_cpu else ("y",)
    the_same_by((1, 2, 5), functools.partial(differentiate, fn, arguments, dout), names)


@best
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "per_token"),
    [(3, False), (2, True), (3, True)],
    ids=["a row each sequence", "a row each token", "by torch on the CPU"],
)
def test_gates_of_many_contexts(fn, dtype, tokens, per_token):
    """More than a piece of rows, panel of columns and run of a sum hold, by some of a table's rows and by several
    threads."""
    index = None if per_token else [3 * (b * 7 % 150) for b in range(300)]
    case = Case("contexts", 300, tokens, 12, 10, 70, rows=None if per_token else 451, index=index, per_token=per_token)
    arguments, dout = factored_arguments(case, 41, dtype)
    check_family(fn, factored_modulated_linear_ref, arguments, dout)
    if fn.keywords["backend"] == "cpu" and not (per_token and tokens == 3):
        names = ("dcontext", "dcontext_factor")
        the_same_by((1, 3, 8), functools.partial(differentiate, fn, arguments, dout), names)


@best
def test_temporaries_do_not_grow_with_the_contexts(fn):
    """The same rows of one context and of each its own: no weight of a context is made."""
    peaks = []
    for count in (1, 64):
        case = Case("contexts", 64, 32, 256, 256, 8, rows=count, index=[b % count for b in range(64)])
        arguments, dout = factored_arguments(case, 16)
        differentiate(fn, arguments, dout)
        peaks.append(peak_extra_bytes(functools.partial(differentiate, fn, arguments, dout)))
    assert peaks[1] <= peaks[0] + 64 * 1024, peaks


def test_an_index_out_of_range_is_refused():
    arguments, _ = factored_arguments(BY_ID["shared-uneven"], 3)
    arguments["context_index"] = arguments["context_index"] + len(arguments["context"])
    for backend in (None, "portable", "reference"):
        with pytest.raises(ValueError, match="context_index"):
            ctxkern.factored_modulated_linear(**arguments, backend=backend)


@pytest.mark.parametrize(
    "name", ["odd", "no-weight", "shared-uneven", "ragged-empty-sequences", "ragged-shared", "context-per-token"]
)
def test_is_modulated_linear_with_the_tensor_of_its_factors(name):
    arguments, dout = factored_arguments(BY_ID[name], 4, torch.float64)

    def whole(in_factor, context_factor, out_factor, **others):
        bilinear = torch.einsum("dr,re,kr->dek", in_factor, out_factor, context_factor)
        return ctxkern.modulated_linear(bilinear=bilinear, **others)

    got = differentiate(ctxkern.factored_modulated_linear, arguments, dout)
    torch.testing.assert_close(got, differentiate(whole, arguments, dout))

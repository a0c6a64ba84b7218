"""factored_modulated_linear: against the oracle, and as modulated_linear with the tensor its factors stand for."""

import pytest
import torch

import ctxkern
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.testing.cases import CASES
from ctxkern.testing.families import factored_arguments
from ctxkern.testing.oracle import check_family, differentiate

DTYPES = {
    "f32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "f16": (torch.float16, None),
    "f64": (torch.float64, None),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
}
BY_ID = {case.id: case for case in CASES}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if c.id != "deep"], ids=lambda c: c.id)
def test_matches_the_oracle(case, dtypes):
    arguments, dout = factored_arguments(case, 3, *dtypes)
    check_family(ctxkern.factored_modulated_linear, factored_modulated_linear_ref, arguments, dout)


@pytest.mark.parametrize("rank", [0, 1, 2, 17])
@pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared", "context-per-token"])
def test_ranks(name, rank):
    arguments, dout = factored_arguments(BY_ID[name], rank)
    check_family(ctxkern.factored_modulated_linear, factored_modulated_linear_ref, arguments, dout)


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

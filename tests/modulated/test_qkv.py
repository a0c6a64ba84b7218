"""modulated_qkv against the oracle: three widths at once, every dtype, and as three modulated_linear."""

from functools import partial

import pytest
import torch

import ctxkern
from ctxkern.reference import modulated_qkv_ref
from ctxkern.testing.cases import CASES
from ctxkern.testing.families import by_projection, qkv_arguments
from ctxkern.testing.oracle import check_family

DTYPES = {
    "bf16": (torch.bfloat16, None),
    "f16": (torch.float16, None),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
    "f64": (torch.float64, None),
}
NAMES = ("odd", "no-weight", "shared-uneven", "shared-even", "ragged-shared", "decode", "context-per-token")
BY_ID = {case.id: case for case in CASES}


def check_qkv(case, dtypes, workspace, widths):
    arguments, douts = qkv_arguments(case, *dtypes, widths)
    fn = partial(ctxkern.modulated_qkv, workspace_bytes=workspace)
    check_family(by_projection(fn), by_projection(modulated_qkv_ref), arguments, douts, case.id)


@pytest.mark.parametrize("workspace", [1 << 10, None])
@pytest.mark.parametrize("case", [c for c in CASES if c.id != "deep"], ids=lambda c: c.id)
def test_case_table(case, workspace):
    check_qkv(case, (torch.float32, None), workspace, [case.E, case.E // 2 + 1, 1])


@pytest.mark.parametrize("workspace", [1 << 10, None])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtypes, workspace):
    case = BY_ID[name]
    check_qkv(case, dtypes, workspace, [case.E] * 3)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_some_projections_without(missing):
    arguments, douts = qkv_arguments(BY_ID["odd"])
    arguments[f"{missing}1"] = None
    check_family(by_projection(ctxkern.modulated_qkv), by_projection(modulated_qkv_ref), arguments, douts)


@pytest.mark.parametrize("name", NAMES)
def test_is_three_calls(name):
    arguments, _ = qkv_arguments(BY_ID[name], torch.float64)
    outs = by_projection(ctxkern.modulated_qkv)(**arguments)
    shared = {n: arguments[n] for n in ("x", "context", "context_index", "cu_seqlens")}
    for i, y in enumerate(outs):
        each = {n: arguments[f"{n}{i}"] for n in ("weight", "bilinear", "bias")}
        torch.testing.assert_close(y, ctxkern.modulated_linear(**shared, **each))

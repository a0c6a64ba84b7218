"""modulated_linear against the float64 oracle: the case table, every dtype, every backend."""

import pytest
import torch

import ctxkern
from ctxkern.testing.cases import CASES, DTYPES, make_inputs
from ctxkern.testing.oracle import check

DTYPES = {**DTYPES, "f64": (torch.float64, torch.float64)}
# from a strip of one row of one weight to everything at once
WORKSPACES = [1, 1 << 12, None]


@pytest.mark.parametrize("workspace", WORKSPACES, ids=["ws-least", "ws-4k", "ws-default"])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_the_oracle(case, dtype, param_dtype, workspace):
    def fn(*args, **kwargs):
        return ctxkern.modulated_linear(*args, workspace_bytes=workspace, **kwargs)

    check(fn, make_inputs(case, dtype, param_dtype), case.id)

"""modulated_linear against the float64 oracle: the case table, every dtype, every backend."""

import pytest
import torch

import ctxkern
from ctxkern.testing.cases import CASES, make_inputs
from ctxkern.testing.oracle import check

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
IDS = ["f32", "bf16", "f16", "bf16-f32-params", "f16-f32-params", "f64"]
# from a strip of one row of one weight to everything at once
WORKSPACES = [1, 1 << 12, None]


@pytest.mark.parametrize("workspace", WORKSPACES, ids=["ws-least", "ws-4k", "ws-default"])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES, ids=IDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_the_oracle(case, dtype, param_dtype, workspace):
    def fn(*args, **kwargs):
        return ctxkern.modulated_linear(*args, workspace_bytes=workspace, **kwargs)

    check(fn, make_inputs(case, dtype, param_dtype), case.id)

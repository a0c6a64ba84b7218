"""modulated_linear against its peers over the case table. A wrong result fails before anything is timed."""

import pytest

from ctxkern.testing import cases
from ctxkern.testing.cases import BENCH_CASES, make_inputs
from ctxkern.testing.peers import calls
from ctxkern.testing.report import measure_case

DTYPES = {name: cases.DTYPES[name] for name in ("f32", "bf16", "bf16-f32-params")}
# rows per context from which it must be no slower than the einsum
ENOUGH_ROWS = 32


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", BENCH_CASES, ids=lambda c: c.id)
def test_modulated_linear(case, dtype, param_dtype, backward, benchmark, request, rows, peaks):
    device = request.config.getoption("--device")
    inputs = make_inputs(case, dtype, param_dtype, device)
    made = measure_case(
        case,
        inputs,
        backward,
        compiled=request.config.getoption("--compiled"),
        seconds=request.config.getoption("--seconds"),
        peaks=peaks[dtype],
    )
    rows += made
    mine = next(row for row in made if row["peer"] == "ctxkern")
    benchmark.extra_info.update(mine)
    benchmark.pedantic(calls(inputs, backward)["ctxkern"], rounds=3, warmup_rounds=1)
    if case.tokens >= ENOUGH_ROWS * case.contexts:
        assert float(mine["speedup_over_einsum"]) >= 1.0, f"{mine['speedup_over_einsum']} of the einsum's speed"

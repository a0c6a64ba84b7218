"""factored_modulated_linear with every gradient against its peers. Rows go to bench/results/factored-<device>.csv. A
wrong result fails before anything is timed."""

from statistics import geometric_mean

import pytest
import torch
from tables import best_form

from ctxkern.dtypes import name_of
from ctxkern.functional import factored_modulated_linear
from ctxkern.plan import compute_dtype
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.testing.factored_peers import FACTORED_CASES, calls, inputs_of
from ctxkern.testing.oracle import check_family
from ctxkern.testing.report import append, family_rows, results_file

# bfloat16 where torch has units for it: elsewhere its products take a hundred times as long
DTYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if compute_dtype("cpu", dtype) is dtype]


def test_factored_modulated_linear(request, capsys):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("measures the CPU")
    seconds, rows, speeds = request.config.getoption("--seconds"), [], {}
    for dtype in DTYPES:
        for case in FACTORED_CASES:
            given, dy = inputs_of(case, dtype)
            check_family(factored_modulated_linear, factored_modulated_linear_ref, given, dy, case.id)
            made = family_rows(case, dtype, calls(case, dtype), seconds)
            rows += made
            ms = {row["peer"]: float(row["p50_ms"]) for row in made}
            best = best_form("factored", ms)
            speeds[case.id, name_of(dtype)] = ms[best] / ms["ctxkern"]
            with capsys.disabled():
                print(
                    f"\n{case.id:24} {name_of(dtype):9} ctxkern {ms['ctxkern']:8.3f} ms, {best} {ms[best]:8.3f}: "
                    f"{ms[best] / ms['ctxkern']:.2f} ×, plain {ms['plain'] / ms['ctxkern']:.2f} ×, price "
                    f"{ms['ctxkern'] / ms['linear']:.2f}, whole tensor {ms['bilinear'] / ms['ctxkern']:.2f} ×",
                    end="",
                )
    with capsys.disabled():
        print(f"\n{geometric_mean(speeds.values()):.2f} × the best PyTorch form over {len(speeds)}")
    path = results_file("cpu", request.config.rootpath / "bench" / "results")
    append(rows, path.with_name(f"factored-{path.name}"), list(rows[0]))
    least = min(speeds, key=speeds.get)
    assert speeds[least] >= 1.0, f"{speeds[least]:.2f} of the best PyTorch form's speed at {least}"

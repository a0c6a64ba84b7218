"""lora_linear with a frozen base against its peers: forward and backward, many adapters in one batch. Rows go to
bench/results/lora-<device>.csv. A wrong result fails before anything is timed."""

from statistics import geometric_mean

import pytest
import torch
from tables import best_form

from ctxkern.dtypes import name_of
from ctxkern.functional import lora_linear
from ctxkern.plan import compute_dtype
from ctxkern.reference import lora_linear_ref
from ctxkern.testing.lora_peers import LORA_CASES, SCALE, calls, inputs_of
from ctxkern.testing.oracle import check_family
from ctxkern.testing.report import append, family_rows, results_file

# bfloat16 where torch has units for it: elsewhere its products take a hundred times as long
DTYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if compute_dtype("cpu", dtype) is dtype]


def _check(case, dtype):
    x, weight, A, B, dy = inputs_of(case, dtype)
    given = {"x": x, "weight": weight, "A": A, "B": B, "scale": SCALE}
    check_family(lora_linear, lora_linear_ref, given, dy, case.id)


def _line(case, dtype, ms):
    """(text, speed over the best form, price)."""
    best = best_form("lora", ms)
    speed, price = ms[best] / ms["ctxkern"], ms["ctxkern"] / ms["linear"]
    loop = ms["one by one"] / ms["ctxkern"]
    peft = "".join(f", {name} {ms[name] / ms['ctxkern']:.2f} ×" for name in ms if name.startswith("PEFT"))
    text = (
        f"{case.id:18} {name_of(dtype):9} ctxkern {ms['ctxkern']:8.3f} ms, {best} {ms[best]:8.3f}: {speed:.2f} ×, "
        f"price {price:.2f}, one by one {loop:.2f} ×{peft}"
    )
    return text, speed, price


def test_lora_linear(request, capsys):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("measures the CPU")
    seconds, rows, speeds = request.config.getoption("--seconds"), [], {}
    for dtype in DTYPES:
        for case in LORA_CASES:
            _check(case, dtype)
            made = family_rows(case, dtype, calls(case, dtype), seconds)
            rows += made
            text, speed, _ = _line(case, dtype, {row["peer"]: float(row["p50_ms"]) for row in made})
            speeds[case.id, name_of(dtype)] = speed
            with capsys.disabled():
                print(text if rows != made else f"\n{text}")
    least = min(speeds, key=speeds.get)
    with capsys.disabled():
        mean = geometric_mean(speeds.values())
        print(f"{mean:.2f} × the best PyTorch form over {len(speeds)}; least {speeds[least]:.2f} at {least}")
    path = results_file("cpu", request.config.rootpath / "bench" / "results")
    append(rows, path.with_name(f"lora-{path.name}"), list(rows[0]))
    assert speeds[least] >= 1.0, f"{speeds[least]:.2f} of the best PyTorch form's speed at {least}"

import csv

import pytest
import torch

from ctxkern.cli import main
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import Ceilings, Timing
from ctxkern.testing.report import COLUMNS, rows_of


@pytest.mark.parametrize("backward", [False, True])
def test_shares_of_the_floor_by_hand(backward):
    case = Case("hand", 3, 5, 16, 24, 8)
    inputs = make_inputs(case, torch.float32, torch.float32)
    timings = {name: Timing(1.0, 2.0, 3.0, 5) for name in ("ctxkern", "linear")}
    rows = rows_of(case, inputs, backward, timings, dict.fromkeys(timings, 0), Ceilings(1e6, 1e30))
    passes = 3 if backward else 1
    linear = passes * 2 * 15 * 16 * 24
    flops = {"linear": linear, "ctxkern": linear + passes * 2 * 3 * 16 * 24 * 8}
    for row in rows:
        expected = flops[row["peer"]] / 1e6
        assert float(row["floor_ms"]) == pytest.approx(1e3 * expected, abs=1e-3)
        assert float(row["floor_share"]) == pytest.approx(expected / 2, abs=1e-3)
    by_bytes = rows_of(case, inputs, False, timings, dict.fromkeys(timings, 0), Ceilings(1e30, 1e6))
    moved = next(row for row in by_bytes if row["peer"] == "linear")
    assert float(moved["floor_ms"]) == pytest.approx(1e3 * 4 * (15 * (16 + 24) + 16 * 24) / 1e6, abs=1e-3)


def test_a_short_run(tmp_path, capsys):
    sizes = "--batch 2 --seq 8 --d-model 32 --d-out 16 --context-dim 4 --seconds 0.1".split()
    assert main(["bench", *sizes, "--csv", str(tmp_path / "rows.csv")]) == 0
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(COLUMNS)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert {"ctxkern", "einsum", "linear"} <= {row["peer"] for row in rows}
    for row in rows:
        assert float(row["floor_ms"]) > 0
        assert float(row["p50_ms"]) > 0
    assert "of floor" in capsys.readouterr().out


def test_more_contexts_than_sequences_is_an_error(capsys):
    assert main(["bench", "--batch", "2", "--contexts", "3"]) == 2
    assert "--contexts is 3; it must be at most --batch = 2" in capsys.readouterr().err

"""What the Triton kernels compile to for GPUs that are not here; in a process of its own, without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "audit.py"
TABLE = ROOT / "bench" / "results" / "triton-audit.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SM_100 = "three variants keep up to 16 words in local memory there"


def fresh(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__import__("ctxkern").__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=1200)


def audited(*arguments, prelude=""):
    run = f"import runpy, sys\nsys.argv[0] = {str(SCRIPT)!r}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return fresh(prelude + run, *arguments)


def test_kernels_reach_the_matrix_unit_without_spills():
    done = audited("--arch", "sm_90", "--quick")
    assert done.returncode == 0, done.stderr
    kernels = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"panel_make", "panel_project", "panel_gather", "panel_turn", "panel_spread", "outer_forward"} <= kernels


def test_a_tile_that_is_too_large_is_found():
    prelude = (
        "from ctxkern.backends.triton import tiles\n"
        "for name in ('project', 'turn'):\n"
        "    tiles._TILES[name, 'half'] = tiles.Tile(128, 256, 64, 4, 6)\n"
    )
    done = audited("--arch", "sm_90", "--quick", prelude=prelude)
    assert done.returncode == 1
    assert "spills" in done.stderr
    assert "bytes of shared memory" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    ["sm_80", "sm_90", pytest.param("sm_100", marks=pytest.mark.xfail(reason=SM_100, strict=True)), "gfx942"],
)
def test_every_kernel_on_every_target(arch):
    done = audited("--arch", arch)
    assert done.returncode == 0, done.stderr


def test_the_table_has_every_target_and_its_spills_are_known():
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arch"] for row in rows} == set(TARGETS)
    spilled = [(row["arch"], row["kernel"], int(row["spills"])) for row in rows if row["spills"] != "0"]
    assert sorted(spilled) == [
        ("sm_100", "panel_spread", 5),
        ("sm_100", "panel_turn", 16),
        ("sm_100", "panel_turn", 16),
    ]


_MEMORY = """
import torch
from ctxkern.backends.triton import modulated
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.kernels import recorded
from ctxkern.testing.measure import peak_extra_bytes

CASES = [
    Case("wide", 32, 128, 512, 512, 64),
    Case("shared", 32, 64, 256, 256, 64, rows=5, index=tuple(i % 5 for i in range(32))),
    Case("ragged", 32, 0, 256, 256, 64, lengths=tuple(16 + 4 * i for i in range(32))),
    Case("per-token", 8, 64, 256, 256, 64, per_token=True),
    Case("decode", 64, 1, 512, 512, 32),
]
with recorded("sm_90"):
    for case in CASES:
        for dtype, param_dtype in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2):
            made = make_inputs(case, dtype, param_dtype)
            lists = [made.weight] * 3, [made.bilinear] * 3
            spans = made.context_index, made.cu_seqlens
            for workspace in (2 << 20, 32 << 20):
                peaks = [
                    peak_extra_bytes(lambda: modulated.modulated_forward(
                        made.x, made.context, *lists, [None] * 3, *spans, workspace)),
                    peak_extra_bytes(lambda: modulated.modulated_backward(
                        [made.dy] * 3, made.x, made.context, *lists, *spans, workspace, [True] * 8 + [False] * 3)),
                ]
                # x, y and their gradients in float32, and the order of the rows
                allowed = workspace + 3 * case.tokens * max(case.D, case.E) * 4
                print(case.id, dtype, param_dtype, workspace >> 20, *(f"{p / 2**20:.2f}" for p in peaks), flush=True)
                assert max(peaks) <= allowed, (case.id, peaks, allowed)
"""


def test_temporaries_stay_within_the_workspace():
    done = fresh(_MEMORY)
    assert done.returncode == 0, done.stdout + done.stderr

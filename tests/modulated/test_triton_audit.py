"""What the Triton kernels compile to for GPUs that are not here; in a process of its own, without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "audit.py"
TABLE = ROOT / "bench" / "results" / "triton-audit.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


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
        "from ctxkern.runtime.triton import tiles\n"
        "for name in ('project', 'turn'):\n"
        "    tiles._TILES[name, 'half', 'sm_90', 'aligned'] = tiles.Tile(128, 256, 64, 4, 6)\n"
    )
    done = audited("--arch", "sm_90", "--quick", prelude=prelude)
    assert done.returncode == 1
    assert "spills" in done.stderr
    assert "bytes of shared memory" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_on_every_target(arch):
    done = audited("--arch", arch)
    assert done.returncode == 0, done.stderr


def test_the_committed_table_has_every_target_and_no_spills():
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arch"] for row in rows} == set(TARGETS)
    assert {"panel_persistent", "panel_make", "outer_forward"} <= {row["kernel"] for row in rows}
    assert [row for row in rows if row["spills"] != "0"] == []


_LAUNCHES = """
import torch
from ctxkern import plan as planner
from ctxkern.modulated.triton import modulated
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.kernels import recorded

made = make_inputs(Case("step", 16, 128, 256, 256, 32), torch.bfloat16, device="meta")
lists = [made.weight] * 3, [made.bilinear] * 3
for one in (False, True):
    planner.GPU_PERSISTENT = one
    with recorded("sm_90") as launches:
        modulated.modulated_forward(made.x, made.context, *lists, [None] * 3, None, None, 32 << 20)
    print(*launches.names)
with recorded("sm_90") as launches:
    modulated.modulated_backward(
        [made.dy] * 3, made.x, made.context, *lists, None, None, 32 << 20, [True] * 8 + [False] * 3)
print(*launches.names)
"""


def test_three_projections_take_the_launches_of_one():
    done = fresh(_LAUNCHES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "panel_make panel_project",
        "panel_persistent",
        "panel_gather panel_make panel_spread panel_turn sum_partials",
    ]


_MEMORY = """
import torch
from ctxkern.modulated.triton import modulated
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

"""What the Triton kernels compile to for GPUs that are not here; in fresh processes, without the interpreter."""

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
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


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
    assert {
        "panel_weights",
        "panel_y",
        "panel_g",
        "panel_dx",
        "panel_dbilinear",
        "outer_y",
        "outer_dx",
        "outer_dbilinear",
        "matmul",
    } <= kernels


@pytest.mark.slow
def test_a_tile_that_is_too_large_is_found():
    prelude = (
        "from ctxkern.runtime.triton import tiles\n"
        "for name in ('panel_y', 'panel_dx'):\n"
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


def test_the_committed_table_has_known_targets_and_no_spills():
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} <= {row["arch"] for row in rows} <= set(TARGETS)
    assert [row for row in rows if row["spills"] != "0"] == []
    low_rank = {(row["arch"], row["dtypes"]) for row in rows if row["kernel"] == "lora_y"}
    kinds = "fp16", "bf16+fp32", "fp16+fp32", "fp32+bf16"
    assert {(arch, kind) for arch in ("sm_80", "sm_89", "sm_90") for kind in kinds} <= low_rank


_CALLS = """
import torch
from ctxkern.modulated import triton as backend
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.testing import force
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.kernels import recorded
from ctxkern.testing.measure import peak_extra_bytes

def three(case, dtype, param_dtype=None, device="meta"):
    made = make_inputs(case, dtype, param_dtype, device=device)
    spans = made.context_index, made.cu_seqlens
    operands = Operands(made.x, made.context, [made.weight] * 3, [made.bilinear] * 3, [None] * 3, *spans)
    needs = Gradients(True, True, [True] * 3, [True] * 3, [False] * 3)
    return operands, [made.dy] * 3, needs
"""

_LAUNCHES = """
operands, douts, needs = three(Case("step", 16, 128, 256, 256, 32), torch.bfloat16)
for library in (False, True):
    with recorded("sm_90") as launches, force(library=library):
        backend.forward(operands, 32 << 20)
    print(*launches.names)
    with recorded("sm_90") as launches, force(library=library):
        backend.backward(douts, operands, 32 << 20, needs)
    print(*launches.names)
"""


def test_three_projections_take_the_launches_of_one():
    done = fresh(_CALLS + _LAUNCHES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "panel_weights panel_y",
        "panel_g panel_weights panel_dx panel_dcontext_sum",
        "panel_weights",
        "panel_weights panel_dcontext_sum",
    ]


_MEMORY = """
CASES = [
    Case("wide", 32, 128, 512, 512, 64),
    Case("shared", 32, 64, 256, 256, 64, rows=5, index=tuple(i % 5 for i in range(32))),
    Case("ragged", 32, 0, 256, 256, 64, lengths=tuple(16 + 4 * i for i in range(32))),
    Case("per-token", 8, 64, 256, 256, 64, per_token=True),
    Case("decode", 64, 1, 512, 512, 32),
    Case("long", 2, 2048, 512, 512, 4),
]
from ctxkern.runtime.triton import launches
# as kernels are not run either
launches.bmm = launches.baddbmm = lambda *args, out: out
with recorded("sm_90"):
    for case in CASES:
        for dtype, param_dtype in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2):
            operands, douts, needs = three(case, dtype, param_dtype, "cpu")
            for workspace in (1 << 18, 2 << 20, 32 << 20):
                peaks = [
                    peak_extra_bytes(lambda: backend.forward(operands, workspace)),
                    peak_extra_bytes(lambda: backend.backward(douts, operands, workspace, needs)),
                ]
                # x, y and their gradients in float32, and the order of the rows
                allowed = workspace + 3 * case.tokens * max(case.D, case.E) * 4
                print(case.id, dtype, param_dtype, workspace >> 20, *(f"{p / 2**20:.2f}" for p in peaks), flush=True)
                assert max(peaks) <= allowed, (case.id, peaks, allowed)
"""


@pytest.mark.slow
def test_temporaries_stay_within_the_workspace():
    done = fresh(_CALLS + _MEMORY)
    assert done.returncode == 0, done.stdout + done.stderr


_SUMS = """
operands, _, needs = three(Case("price", 16, 256, 2048, 2048, 32), torch.bfloat16)
seen = []
from ctxkern.runtime.triton import launches
def empty(size, **options):
    seen.append((size, options["dtype"]))
    return torch.empty(size, **options)
launches.empty = empty
one = Operands(*(each[:1] if isinstance(each, list) else each for each in operands))
dy = torch.empty(16, 256, 2048, dtype=torch.bfloat16, device="meta")
with recorded("sm_90"), force(library=False):
    backend.backward([dy], one, 2 << 20, Gradients(True, True, [True], [True], [False]))
sums = [4 * size for size, dtype in seen if dtype is torch.float32]
assert len(sums) == 1 and 0 < sums[0] <= operands.x.numel() * 2, seen
"""


_EIGHTS = """
from ctxkern.testing.cases import Case
from ctxkern.testing.kernels import audit, faults, launches_of
problem = Case("eights", 4, 256, 1000, 1000, 32), 32 << 20, 1
for launch in launches_of("sm_90", [problem], [(torch.bfloat16,) * 2]):
    if launch.name in ("panel_y", "panel_g"):
        found = audit(launch, "sm_90")
        assert not faults(launch, "sm_90", found) and found.instructions["LDGSTS"] >= 24, (launch.name, found)
        print(launch.name)
"""


def test_sizes_that_8_divides_and_not_16_are_copied_16_bytes_at_a_time():
    done = fresh(_CALLS + _EIGHTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["panel_y", "panel_g"]


def test_sums_of_dx_take_no_more_memory_than_x():
    done = fresh(_CALLS + _SUMS)
    assert done.returncode == 0, done.stdout + done.stderr

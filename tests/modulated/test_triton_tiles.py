"""The tile table, the blocks that a workspace holds, and the tuner that writes the table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ctxkern.runtime.triton import tiles
from ctxkern.testing import force

TUNE = Path(__file__).parents[2] / "bench" / "tune.py"
SIZES = st.integers(1, 5000)
WIDTHS = st.lists(SIZES, min_size=1, max_size=3)


def test_every_kernel_has_tiles_wherever_it_runs():
    table = tiles.read_table()
    kernels = {kernel for kernel, *_ in table}
    assert len(kernels) == 16
    for kernel in kernels:
        halves = tiles.HALF, tiles.MIXED
        # products of float32 have no more ranks than the others
        for kind in halves if kernel.endswith("_high") else (*halves, tiles.WIDE, tiles.FLOAT, tiles.NARROW):
            for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "of another maker"):
                for aligned in (True, False):
                    t = tiles.tile(kernel, kind, arch, aligned, 1 << 20, 1 << 20, 1 << 20)
                    assert all(size >= 16 and size & (size - 1) == 0 for size in t[:3]), (kernel, t)


def test_rows_of_an_architecture_come_first():
    for (kernel, kind, arch, layout), t in tiles.read_table().items():
        if arch != tiles.ANY:
            for aligned in (True, False):
                if layout in (tiles.ANY, tiles.ALIGNED if aligned else tiles.UNALIGNED):
                    found = tiles.found(kernel, kind, arch, aligned)
                    assert found == t or layout == tiles.ANY


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_89"),
        ("sm_89", "sm_89"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_89"),
        ("sm_121", "sm_89"),
        ("gfx90a", "gfx942"),
    ],
)
def test_architectures_without_rows_take_those_of_a_relative(name, known):
    assert tiles.family(name) == known


def test_tiles_are_those_of_the_device_of_the_tensors(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 0), (8, 9), (9, 0))[device.index])
    tiles.architecture.cache_clear()
    try:
        assert [tiles.architecture(torch.device("cuda", i)) for i in range(3)] == ["sm_80", "sm_89", "sm_90"]
    finally:
        tiles.architecture.cache_clear()


def test_forced_tiles_come_before_the_table():
    of = "panel_y", tiles.HALF, "sm_90", True
    with force(tiles={"panel_y": tiles.Tile(32, 64, 16, 4, 2)}):
        assert tiles.tile(*of, 1 << 20, 1 << 20, 1 << 20) == (32, 64, 16, 4, 2)
        assert tiles.tile("panel_dx", *of[1:], 1 << 20, 1 << 20, 1 << 20) == tiles.found("panel_dx", *of[1:])
    assert tiles.tile(*of, 1 << 20, 1 << 20, 1 << 20) == tiles.found(*of)


@given(d_in=SIZES, d_outs=WIDTHS, limit=st.integers(1, 300), kib=st.integers(1, 40_000))
def test_forward_blocks_fit_into_the_workspace(d_in, d_outs, limit, kib):
    rows, width, strips, group = tiles.forward_blocks(d_in, tuple(d_outs), limit, torch.bfloat16, kib << 10)
    assert rows == d_in
    assert 1 <= width <= max(d_outs)
    assert 1 <= group <= limit
    assert 1 <= strips <= sum(-(-d_out // width) for d_out in d_outs)
    least = width == 1 and strips == 1 and group == 1
    assert 2 * rows * width * strips * group <= kib << 10 or least


@given(
    tokens=st.integers(1, 100_000),
    d_in=SIZES,
    d_outs=WIDTHS,
    k=st.integers(0, 512),
    limit=st.integers(1, 300),
    kib=st.integers(1, 40_000),
)
def test_backward_blocks_fit_into_the_workspace(tokens, d_in, d_outs, k, limit, kib):
    blocks = tiles.backward_blocks(tokens, d_in, tuple(d_outs), k, limit, torch.bfloat16, torch.float32, kib << 10)
    rows, width, strips, group = blocks
    assert 1 <= rows <= d_in
    # what dx is summed in where a block has not all columns
    assert width * strips >= sum(d_outs) or 4 * rows <= max(2 * d_in, 4)
    assert 1 <= width <= max(d_outs)
    assert 1 <= group <= limit
    sums = 4 * (k + 1) if group < limit else 0
    used = rows * width * strips * (2 * group + sums)
    assert used <= kib << 10 or (rows, strips, group) == (1, 1, 1)


def _tuned(*arguments):
    return subprocess.run([sys.executable, TUNE, *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_tuner_runs():
    before = tiles.TABLE.read_text()
    done = _tuned("--rehearse", "--kernels", "outer_y", "lora_y", "--dtypes", "float32")
    assert done.returncode == 0, done.stderr
    for kernel in ("outer_y", "lora_y"):
        assert f"{kernel} float32 sm_90 unaligned ->" in done.stdout
    assert tiles.TABLE.read_text() == before


_COMPILE = """
import runpy, sys
from pathlib import Path
from ctxkern.runtime.triton import tiles

tiles.TABLE = Path(sys.argv[2])
tiles._TILES["lora_y", "half", "sm_90", "aligned"] = tiles.Tile(128, 256, 64, 4, 6)
tune, sys.argv = sys.argv[1], ["tune", "--compile", "sm_90", "--kernels", "lora_y", "lora_y_high", "--dtypes", "half"]
runpy.run_path(tune, run_name="__main__")
"""


@pytest.mark.slow
def test_the_tuner_chooses_by_compiling(tmp_path):
    """Another tile where the one that there is spills; those without faults stay."""
    table = tmp_path / "table.csv"
    table.write_text(tiles.TABLE.read_text())
    environment = {**os.environ, "PYTHONPATH": str(TUNE.parents[1]), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _COMPILE, str(TUNE), str(table)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = tiles.read_table(), tiles.read_table(table)
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {("lora_y", "half", "sm_90", "aligned")}
    assert after[changed.pop()] != tiles.Tile(128, 256, 64, 4, 6)


def test_the_tuner_says_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = _tuned()
    assert done.returncode == 1
    assert "no GPU here" in done.stderr

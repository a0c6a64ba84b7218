"""`ctxkern train` as two processes: what one process trains, in shares, under DDP and FSDP2, and back on one."""

import signal

import pytest
import torch
from helpers.runs import SHARDED, SIZES, finish, start, wait_for_step
from safetensors.torch import load_file

from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.config import TrainConfig

# without dropout, whose draws differ by process
SETTINGS = SIZES | {"batch_size": 5, "dropout": 0.0, "dtype": "float64", "schedule": "constant", "device": "cpu"}
FLAGS = [part for name, value in SETTINGS.items() for part in (TrainConfig.flag(name), str(value))]
FLAGS += ["--no-compare-einsum", "--quiet"]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b.txt", "c.txt")):
        letters = torch.randint(97, 105, (1500,), generator=torch.Generator().manual_seed(number))
        (folder / name).write_bytes(bytes(letters.tolist()))
    return folder


def launch(*argv, script=None):
    """Two processes of `ctxkern train`, or of a script that calls it."""
    what = [script, "train"] if script else ["-m", "ctxkern", "train"]
    return start(*what, *argv, program=("-m", "torch.distributed.run", "--nproc-per-node", "2"))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(texts, tmp_path, kind):
    script = None
    if kind == "fsdp2":
        script = tmp_path / "sharded.py"
        script.write_text(SHARDED)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one = start(texts, *FLAGS, "--steps", 9, "--run-dir", whole)
    out = finish(launch(texts, *FLAGS, "--steps", 4, "--run-dir", parts, script=script))
    assert out.count("validation loss") == 1, out
    finish(one)
    if script:
        finish(launch("--resume", "--run-dir", parts, "--steps", 7, "--quiet", script=script))
    finish(start("--resume", "--run-dir", parts, "--steps", 9, "--no-compare-einsum", "--quiet"))
    expected, found = (load_file(folder / "last.safetensors") for folder in (whole, parts))
    torch.testing.assert_close(found, expected)
    rows = [[(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row] for folder in (whole, parts)]
    assert [step for step, _ in rows[1]] == list(range(1, 10))
    torch.testing.assert_close(*(torch.tensor(pairs, dtype=torch.float64) for pairs in rows))


@pytest.mark.slow
def test_a_signal_ends_both_and_saves(texts, tmp_path):
    process = launch(texts, *FLAGS, "--steps", 10**6, "--run-dir", tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 30)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0].decode()
    assert "by SIGTERM; continue with" in out
    done = read_metrics(tmp_path / "run")[-1]["step"]
    out = finish(launch("--resume", "--run-dir", tmp_path / "run", "--steps", done + 3, "--quiet"))
    assert f"at step {done + 3}" in out or f"step {done + 3}:" in out


def test_a_batch_may_have_fewer_rows_than_parts(texts, tmp_path):
    found = []
    for parts in (2, 3):
        run_dir = tmp_path / str(parts)
        finish(start(texts, *FLAGS, "--batch-size", "2", "--accumulate", parts, "--steps", 4, "--run-dir", run_dir))
        found.append(load_file(run_dir / "last.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

"""Runs of the command and of the loop, small enough for tests."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ctxkern
from ctxkern.cli import main
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.config import TrainConfig

SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context_dim": 4, "seq_len": 16, "batch_size": 4, "dropout": 0.1}
TINY = [*(part for name, value in SIZES.items() for part in (TrainConfig.flag(name), str(value))), "--quiet"]
PACKAGE = Path(ctxkern.__file__).parent.parent
DATA = Path(__file__).parents[3] / "shared" / "data"

# accelerate has FSDP for accelerators alone: its state is told so
SHARDED = """
import sys, torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ctxkern.experiments.core import loop, processes
from ctxkern.cli import main

plain, sharded = processes.accelerator, []

def accelerator(device):
    made = plain(device)
    made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return made

def step(run, batch, plain=loop._Run._step):
    plain(run, batch)
    sharded.append(all(hasattr(parameter, "full_tensor") for parameter in run.model.parameters()))

processes.accelerator, loop._Run._step = accelerator, step
status = main(sys.argv[1:])
sys.exit(status if sharded and all(sharded) else "not sharded")
"""


class KilledError(Exception):
    """Stands for a kill."""


def tiny(**changes):
    """Settings of a run of 12 steps."""
    short = {"training_steps": 12, "checkpoint_every": 5, "device": "cpu", "patience": 0}
    return TrainConfig(**SIZES | short | changes)


def write(folder, name, value):
    """The path of a new file of bytes or text."""
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else value.encode())
    return path


def stop_at(loss_fn, step, error=KilledError):
    """`loss_fn`, raising `error` at its call number `step`."""
    calls = iter(range(10**6))

    def stopping(model, batch):
        if next(calls) == step:
            raise error
        return loss_fn(model, batch)

    return stopping


def error_of(capsys, *argv):
    """What a command that must exit with 2 says on stderr."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert err.endswith("\n")
    assert "Traceback" not in out + err
    return err


def failed(capsys, *argv):
    """The one line on stderr of a command that must exit with 2."""
    err = error_of(capsys, *argv)
    assert err.count("\n") == 1, err
    return err


def start(*argv, program=("-m", "ctxkern", "train"), **env):
    """The process of `ctxkern train`, or of another program, with as many threads as this one: bits depend on them."""
    threads = str(torch.get_num_threads())
    env = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | env
    command = [
        sys.executable,
        *program,
        *(os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg) for arg in argv),
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, status=0):
    """What a process that must end with `status` has written."""
    out = process.communicate(timeout=180)[0].decode(errors="surrogateescape")
    assert process.returncode == status, out
    assert "Traceback" not in out
    return out


def wait_for_step(process, run_dir, step):
    """Until the log of the run has reached `step`."""
    while process.poll() is None:
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"ended before step {step}: {process.communicate()[0]}")

"""Jobs that several processes do together over gloo, many in one launch: starting a process takes seconds."""

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

TESTS = Path(__file__).parents[1]


def together(folder, world, *jobs):
    """Runs jobs, "file.function" of tests/distributed, one after another in each of `world` processes."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, __file__, str(rank), str(world), str(folder), *jobs] for rank in range(world)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    ranks = [subprocess.Popen(command, **how) for command in commands]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


def main(rank, world, folder, *jobs):
    """Does jobs, each a function of (rank, world, folder)."""
    torch.set_num_threads(1)
    store = Path(folder, f"store-{world}")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    for job in jobs:
        file, name = job.split(".")
        try:
            getattr(importlib.import_module(f"distributed.{file}"), name)(int(rank), int(world), Path(folder))
        except BaseException:
            print(f"{job}, process {rank}")
            traceback.print_exc()
            sys.stderr.flush()
            # the others, which may wait for this one, fail when its connections close
            os._exit(1)
    dist.destroy_process_group()


def full(t):
    """The whole of a DTensor; anything else as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(model):
    """{name: the whole gradient} of the parameters that have one; names are those without a wrapper."""
    return {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def same_on_all(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill(model, std=0.3):
    """Parameters that are trained, as after training: the same values whatever is sharded."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            values = (same_on_all(*p.shape, seed=i) * std).to(p.dtype)
            p.copy_(distribute_tensor(values, p.device_mesh, p.placements) if isinstance(p, DTensor) else values)
    return model


def share(t, rank, world):
    """The part of a batch that a process has."""
    size = len(t) // world
    return t[rank * size : (rank + 1) * size]


if __name__ == "__main__":
    main(*sys.argv[1:])

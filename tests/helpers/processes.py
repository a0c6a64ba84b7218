"""Jobs that several processes do together over gloo, all jobs of a file in one launch: starting torch takes seconds."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

TESTS = Path(__file__).parents[1]


def together(file, folder, world=2, jobs=()):
    """Runs the jobs of a test file (all of them for none) in `world` processes, each of which ends with `main`."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, file, str(rank), str(world), str(folder), *jobs] for rank in range(world)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    ranks = [subprocess.Popen(command, **how) for command in commands]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


def main(*jobs):
    """Does those that the command line names: job(rank, world, folder)."""
    rank, world, folder, *names = sys.argv[1:]
    rank, world = int(rank), int(world)
    torch.set_num_threads(1)
    store = Path(folder, f"store-{world}-{'-'.join(names)}")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for job in jobs:
        if names and job.__name__ not in names:
            continue
        try:
            job(rank, world, Path(folder))
        except BaseException:
            print(f"{job.__name__}, process {rank}")
            traceback.print_exc()
            sys.stdout.flush()
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

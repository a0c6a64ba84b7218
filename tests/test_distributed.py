"""Two processes over gloo: data parallel, sharded and tensor parallel layers equal one process on the joint batch."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ctxkern
from ctxkern.nn import ContextModulatedAttention
from ctxkern.testing.cases import Case
from ctxkern.testing.families import modulated_arguments
from ctxkern.testing.oracle import differentiate

WORLD, STEPS, B, S, D, K = 2, 3, 4, 5, 8, 3


class Model(nn.Module):
    """Two context-modulated layers over a table of learnt contexts."""

    def __init__(self):
        super().__init__()
        self.contexts = nn.Embedding(6, K)
        self.layers = nn.ModuleList(ContextModulatedAttention(D, K, 2, init="hyperfan") for _ in range(2))

    def forward(self, x, files):
        table, index = files.unique(return_inverse=True)
        context = self.contexts(table)
        for layer in self.layers:
            x = x + layer(x, context, context_index=index)
        return x


def seeded_model():
    torch.manual_seed(0)
    return Model().double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(6, (B,), generator=generator)


def train(model, share=slice(None)):
    """Parameters after some steps on this process's share of each batch, and the gradients of the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x, files = (t[share] for t in batch(step))
        optimizer.zero_grad()
        model(x, files).square().mean().backward()
        if step < STEPS - 1:
            optimizer.step()
    return {n.removeprefix("module."): (full(p), full(p.grad)) for n, p in model.named_parameters()}


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def share_of(rank):
    return slice(rank * B // WORLD, (rank + 1) * B // WORLD)


def data_parallel(rank):
    torch.testing.assert_close(train(DistributedDataParallel(seeded_model()), share_of(rank)), train(seeded_model()))


def fully_sharded(rank):
    model = seeded_model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model.layers[0].bilinear_q, DTensor)
    assert model.layers[0].bilinear_q.to_local().shape == (D // WORLD, D, K)
    torch.testing.assert_close(train(model, share_of(rank)), train(seeded_model()))


def tensor_parallel(rank):
    """Each process holds its columns of weight, bilinear and bias; dx and dcontext are sums over the processes."""
    arguments, dout = modulated_arguments(Case("parallel", 6, 5, 8, 12, 4, rows=3, index=(2, 0, 2, 1, 0, 2), bias=True))
    whole = differentiate(ctxkern.modulated_linear, arguments, dout)
    width = 12 // WORLD
    mine = slice(rank * width, (rank + 1) * width)
    slices = {"weight": arguments["weight"][:, mine], "bilinear": arguments["bilinear"][:, mine]}
    slices["bias"] = arguments["bias"][mine]
    got = differentiate(ctxkern.modulated_linear, arguments | slices, dout[..., mine].contiguous())
    for name in ("dx", "dcontext"):
        dist.all_reduce(got[name])
    parts = [torch.empty_like(got["y"]) for _ in range(WORLD)]
    dist.all_gather(parts, got["y"])
    got["y"] = torch.cat(parts, -1)
    for name, columns in (("dweight", (slice(None), mine)), ("dbilinear", (slice(None), mine)), ("dbias", mine)):
        whole[name] = whole[name][columns]
    torch.testing.assert_close(got, whole)


JOBS = {fn.__name__: fn for fn in (data_parallel, fully_sharded, tensor_parallel)}


def work(job, rank, store):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        JOBS[job](rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_are_one(job, tmp_path):
    store = str(tmp_path / "store")
    commands = [[sys.executable, __file__, job, str(rank), store] for rank in range(WORLD)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(said)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])

"""Data parallel and sharded layers on two processes equal one process on the joint batch."""

import torch
from helpers.processes import full
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ctxkern.nn import ContextModulatedAttention

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


def share_of(rank):
    return slice(rank * B // WORLD, (rank + 1) * B // WORLD)


def data_parallel(rank, *_):
    torch.testing.assert_close(train(DistributedDataParallel(seeded_model()), share_of(rank)), train(seeded_model()))


def fully_sharded(rank, *_):
    model = seeded_model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model.layers[0].bilinear_q, DTensor)
    assert model.layers[0].bilinear_q.to_local().shape == (D // WORLD, D, K)
    torch.testing.assert_close(train(model, share_of(rank)), train(seeded_model()))

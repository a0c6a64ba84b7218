"""An attached model that accelerate prepares."""

import os

import torch
from accelerate import Accelerator

import ctxkern

from .attached import DY, INDEX, KINDS, TABLE, X, attached, share, step, using


def prepared(rank, world, _folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    for kind in KINDS:
        whole = step(attached(kind), kind)[1]
        inner = attached(kind)
        optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=1.0)
        before = {n: p.detach().clone() for n, p in inner.named_parameters()}
        model, optimizer = accelerator.prepare(inner, optimizer)
        with using(model, kind, TABLE, share(INDEX, rank, world)):
            y = model(share(X, rank, world))
        accelerator.backward((y * share(DY, rank, world)).sum() * world)
        optimizer.step()
        after = dict(accelerator.unwrap_model(model).named_parameters())
        torch.testing.assert_close({n: before[n] - after[n].detach() for n in whole}, whole)
        assert ctxkern.detach(accelerator.unwrap_model(model))

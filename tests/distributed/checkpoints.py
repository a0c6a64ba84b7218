"""A sharded checkpoint of what was attached goes on as if nothing had happened, whatever the number of processes."""

import torch
import torch.distributed.checkpoint as dcp
from helpers.attached import D, K, Model, N, R, S
from helpers.processes import fill, full, same_on_all, share
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import ctxkern

B = 12
INDEX = torch.tensor([0, 1, -1, 2, 1, 1, 0, 0, -1, 2, 2, 1])
KINDS = ("contexts", "factors", "adapters", "each adapter")
OPTIONS = StateDictOptions(ignore_frozen_params=True)


def new(kind, world, std):
    torch.manual_seed(0)
    model = Model().double()
    if "adapter" in kind:
        ctxkern.attach_adapters(model, N, R, ["up", "down"], alpha=3)
    else:
        ctxkern.attach_contexts(model, K, ["up", "down"], rank=R if kind == "factors" else None)
    fill(model, std)
    if world > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    own = [p for p in model.parameters() if p.requires_grad]
    if kind == "each adapter":
        return model, ctxkern.AdapterAdamW(own, lr=0.05, lr_scales=[1.0, 0.5, 2.0])
    return model, torch.optim.AdamW(own, lr=0.05)


def train(model, optimizer, kind, steps, rank=0, world=1):
    for step in steps:
        x, dy = (share(same_on_all(B, S, d, seed=10 * step + d), rank, world) for d in (D, 3))
        index = share(INDEX.roll(step), rank, world)
        how = {"adapter_index": index}
        if "adapter" not in kind:
            how = {"context": same_on_all(N, K, seed=7), "context_index": index.clamp(min=0)}
        with ctxkern.use(model, **how):
            y = model(x)
        optimizer.zero_grad()
        (y - dy).square().mean().backward()
        optimizer.step()


def parameters(model):
    return {n: full(p).detach() for n, p in model.named_parameters()}


def begin(rank, world, folder):
    for kind in KINDS:
        model, optimizer = new(kind, world, 0.3)
        train(model, optimizer, kind, range(2), rank, world)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=OPTIONS), strict=True))
        assert not [n for n in parts["model"] if n.endswith("weight")]
        dcp.save(parts, checkpoint_id=folder / kind)


def go_on(rank, world, folder):
    for kind in KINDS:
        whole, uninterrupted = new(kind, 1, 0.3)
        train(whole, uninterrupted, kind, range(4))
        model, optimizer = new(kind, world, 7.0)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=OPTIONS), strict=True))
        dcp.load(parts, checkpoint_id=folder / kind, no_dist=world == 1)
        states = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizer"]}
        set_state_dict(model, optimizer, **states, options=StateDictOptions(ignore_frozen_params=True, strict=False))
        train(model, optimizer, kind, range(2, 4), rank, world)
        torch.testing.assert_close(parameters(model), parameters(whole))

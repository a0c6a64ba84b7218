"""A model to attach to, and what was attached as after training."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctxkern

B, S, D, K, N, R = 4, 5, 8, 6, 3, 2
INDEX = torch.tensor([1, 0, 2, 1])  # the context of each sequence, of N


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head, with checkpoints where `how` is given."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head, self.how = nn.ModuleList([Block(), Block()]), nn.Linear(D, 3), None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, **self.how)
        return self.head(x)


def with_contexts(model, **how):
    ctxkern.attach_contexts(model, K, ["up", "down"], **how)
    randomise(model)
    return model


def with_adapters(model, **how):
    ctxkern.attach_adapters(model, N, R, ["up", "down"], **how)
    randomise(model)
    return model


def randomise(model):
    """What was added, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def new_model():
    torch.manual_seed(0)
    return Model()


def outside(model, x, table, index=INDEX):
    """What the model computes without its cache: gradients are enabled and its parameters require them."""
    with torch.enable_grad(), ctxkern.use(model, context=table, context_index=index):
        return model(x).detach()


def near(got, want):
    """Equal up to the order of float32 sums (of bfloat16 ones), measured by the largest value."""
    band = 32 * torch.finfo(want.dtype).eps
    return ((got - want).abs() <= band * want.abs().max()).all()


def assert_near(got, want):
    assert near(got, want), (got - want).abs().max() / want.abs().max()

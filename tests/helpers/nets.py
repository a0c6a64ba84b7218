"""A small net, its batches, and optimizers whose states differ in kind."""

import torch
from torch import nn


def make_net(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 2))


def batch_at(step):
    rng = torch.Generator().manual_seed(step)
    return {"x": torch.randn(4, 6, generator=rng), "y": torch.randint(0, 2, (4,), generator=rng)}


def net_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def trained_net(optimizer=torch.optim.AdamW, steps=3):
    model = make_net()
    optimizer = optimizer(model.parameters(), lr=0.1)
    for step in range(steps):
        step_once(model, optimizer, step)
    return model, optimizer


def step_once(model, optimizer, step):
    """A step on the batch of `step`, with a closure, which LBFGS calls several times."""

    def closure():
        optimizer.zero_grad()
        loss = net_loss(model, batch_at(step))
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    # lists of tensors, and one of None, in its state
    "lbfgs": lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=3, history_size=4),
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
}

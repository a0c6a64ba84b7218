"""AdapterAdamW: mixed steps move each adapter as steps on it alone do."""

import pytest
import torch
from helpers.attached import B, D, N, S, assert_near, new_model
from torch import nn

import ctxkern

LRS = (0.02, 0.05, 0.01)
# the adapters of the sequences of each step; the second one waits, the third one ends early
MIXES = ([0, 0, 2, 2], [0, 1, 1, 2], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1])


def batch(step):
    torch.manual_seed(step)
    return torch.randn(B, S, D, dtype=torch.float64), torch.randn(B, S, 3, dtype=torch.float64)


def bank(seed=1):
    """A model in float64 with a bank, and the bank."""
    model = new_model().double()
    ctxkern.attach_adapters(model, N, 2, ["up", "down"])
    torch.manual_seed(seed)
    banks = [p for p in model.parameters() if p.requires_grad]
    for p in banks:
        nn.init.normal_(p, std=0.3)
    return model, banks


def loss_of(model, step, adapter, index):
    """The mean loss of the sequences of one adapter."""
    rows = [i for i, a in enumerate(index) if a == adapter]
    x, y = (t[rows] for t in batch(step))
    with ctxkern.use(model, adapter_index=torch.full((len(rows),), adapter)):
        return nn.functional.mse_loss(model(x), y)


def mixed_loss(model, step, index):
    """The mean over the adapters of a step of their losses, in one forward."""
    x, y = batch(step)
    with ctxkern.use(model, adapter_index=torch.tensor(index)):
        by_row = (model(x) - y).square().mean((1, 2))
    counts = torch.bincount(torch.tensor(index), minlength=N)
    return (by_row / counts[index]).sum() / (counts > 0).sum()


@pytest.mark.parametrize("how", [{}, {"grad_clip": 0.05}, {"weight_decay": 0.1}], ids=["plain", "clipped", "decayed"])
def test_mixed_steps_are_steps_of_each_alone(how):
    model, banks = bank()
    optimizer = ctxkern.AdapterAdamW(banks, lr=1.0, lr_scales=LRS, **how)
    for step, index in enumerate(MIXES):
        optimizer.zero_grad()
        mixed_loss(model, step, index).backward()
        optimizer.averaged = len(set(index))
        optimizer.step()
    for adapter, lr in enumerate(LRS):
        alone, rows = bank()
        plain = [nn.Parameter(p[adapter].detach().clone()) for p in rows]
        torch_adamw = torch.optim.AdamW(plain, lr=lr, weight_decay=how.get("weight_decay", 0.0))
        for step, index in enumerate(MIXES):
            if adapter not in index:
                continue
            with torch.no_grad():
                for p, row in zip(rows, plain, strict=True):
                    p[adapter] = row
            alone.zero_grad()
            loss_of(alone, step, adapter, index).backward()
            for p, row in zip(rows, plain, strict=True):
                row.grad = p.grad[adapter].clone()
            if "grad_clip" in how:
                nn.utils.clip_grad_norm_(plain, how["grad_clip"])
            torch_adamw.step()
        for p, row in zip(banks, plain, strict=True):
            assert_near(p[adapter], row)


def test_an_adapter_without_gradient_stays_as_it_is():
    model, banks = bank()
    optimizer = ctxkern.AdapterAdamW(banks, weight_decay=0.1)
    for step, index in enumerate(([0, 1, 2, 2], [0, 0, 2, 2])):
        before = [p[1].clone() for p in banks]
        state = [[value[1].clone() for value in optimizer.state[p].values()] for p in banks]
        optimizer.zero_grad()
        mixed_loss(model, step, index).backward()
        optimizer.step()
    assert all(torch.equal(p[1], row) for p, row in zip(banks, before, strict=True))
    after = [[value[1] for value in optimizer.state[p].values()] for p in banks]
    assert all(torch.equal(*pair) for rows in zip(state, after, strict=True) for pair in zip(*rows, strict=True))
    assert optimizer.state[banks[0]]["steps"].tolist() == [2, 1, 2]


def test_a_reset_adapter_begins_again():
    model, banks = bank()
    optimizer = ctxkern.AdapterAdamW(banks)
    for step in range(2):
        mixed_loss(model, step, [0, 1, 2, 2]).backward()
        optimizer.step()
    optimizer.reset(2)
    assert all(state["steps"].tolist() == [2, 2, 0] for state in optimizer.state.values())
    assert all(not state["exp_avg"][2].any() and state["exp_avg"][0].any() for state in optimizer.state.values())


def test_halves_have_moments_in_float32():
    bank = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = ctxkern.AdapterAdamW([bank], lr=0.5)
    bank.sum().backward()
    optimizer.step()
    assert optimizer.state[bank]["exp_avg"].dtype == torch.float32
    assert set(bank.float().flatten().tolist()) == {0.5}


def test_errors():
    a, b = (nn.Parameter(torch.zeros(n, 2)) for n in (3, 4))
    with pytest.raises(ValueError, match=r"params has banks of \[3, 4\] adapters; all must have as many"):
        ctxkern.AdapterAdamW([a, b])
    with pytest.raises(ValueError, match=r"lr_scales has shape \[2\]; it must be \[3\]"):
        ctxkern.AdapterAdamW([a], lr_scales=[1.0, 2.0])
    with pytest.raises(ValueError, match="weight_decay is -1; it must be at least 0"):
        ctxkern.AdapterAdamW([a], weight_decay=-1)

"""What `lora_linear` is measured against, each as its users write it, for sequences that have an adapter each."""

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ctxkern.functional import lora_linear


class LoraCase(NamedTuple):
    """`adapters` adapters of one rank, each with a sequence of `rows` tokens, d_in = d_out = d; the base is frozen."""

    adapters: int
    rows: int
    d: int
    rank: int

    @property
    def id(self):
        return f"{self.adapters}x{self.rows}-d{self.d}-r{self.rank}"


LORA_CASES = (
    LoraCase(8, 128, 512, 4),
    LoraCase(64, 64, 512, 16),
    LoraCase(16, 256, 512, 64),
    LoraCase(8, 256, 1024, 64),
    LoraCase(32, 128, 1024, 16),
    LoraCase(32, 16, 1024, 16),
    LoraCase(64, 32, 1024, 8),
    LoraCase(16, 64, 2048, 32),
    LoraCase(32, 64, 2048, 16),
)
SCALE = 2.0


def inputs_of(case, dtype, seed=0):
    """(x, weight, A, B, dy); weight is the frozen base."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, fan=1):
        return (torch.randn(*shape, generator=generator) * fan**-0.5).to(dtype)

    u, rows, d, rank = case
    x, dy = drawn(u, rows, d), drawn(u, rows, d)
    return x, drawn(d, d, fan=d), drawn(u, rank, d, fan=d), drawn(u, d, rank, fan=rank), dy


def two_bmm(x, weight, A, B):
    """Two batched products and a sum."""
    return F.linear(x, weight) + torch.bmm(torch.bmm(x, A.mT), B.mT) * SCALE


def baddbmm(x, weight, A, B):
    """The same with the sum in the second product."""
    return torch.baddbmm(F.linear(x, weight), torch.bmm(x, A.mT), B.mT, alpha=SCALE)


def concatenated(x, weight, A, B):
    """All adapters as one of rank u·r, what is of another adapter masked."""
    u, rank = A.shape[:2]
    mask = torch.eye(u, dtype=x.dtype, device=x.device).repeat_interleave(rank, 1)[:, None]
    inner = F.linear(x, A.flatten(0, 1)) * mask
    return F.linear(x, weight) + F.linear(inner, B.transpose(0, 1).flatten(1)) * SCALE


def repeated(x, weight, A, B):
    """A copy of A and B for every token."""
    u, rows, d = x.shape
    flat = x.reshape(-1, d, 1)
    low = B.repeat_interleave(rows, 0) @ (A.repeat_interleave(rows, 0) @ flat)
    return F.linear(x, weight) + low.view(u, rows, -1) * SCALE


def one_by_one(x, weight, A, B):
    """A loop over the adapters of a batch, as PEFT runs mixed batches."""
    base = F.linear(x, weight)
    return torch.stack([base[u] + F.linear(F.linear(x[u], A[u]), B[u]) * SCALE for u in range(len(A))])


def grouped(x, weight, A, B):
    """torch's grouped products."""
    u, rows, d = x.shape
    offsets = torch.arange(rows, u * rows + 1, rows, dtype=torch.int32, device=x.device)
    low = F.grouped_mm(F.grouped_mm(x.view(-1, d), A.mT, offs=offsets), B.mT, offs=offsets)
    return F.linear(x, weight) + low.view(u, rows, -1) * SCALE


def peft_layer(weight, A, B):
    """A layer of PEFT with the adapters "0", "1", ... and their parameters, A and B of one after the other."""
    from peft import LoraConfig, inject_adapter_in_model

    u, rank, _ = A.shape
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["layer"])
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(*weight.mT.shape, bias=False)})
    for i in range(u):
        inject_adapter_in_model(config, model, adapter_name=str(i))
    layer = model["layer"].to(weight.dtype)
    layer.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    leaves = []
    for i in range(u):
        for held, given in ((layer.lora_A, A), (layer.lora_B, B)):
            held[str(i)].weight = torch.nn.Parameter(given[i].detach().clone())
            leaves.append(held[str(i)].weight)
    return layer, leaves


def peft_calls(x, weight, A, B, dy, backward):
    """PEFT's mixed batch, in evaluation mode as it refuses to train, and its training: adapter after adapter, each with
    its own rows and a backward."""
    mixed, leaves = peft_layer(weight, A, B)
    mixed, names = mixed.eval(), [str(i) for i in range(len(A))]
    each, parameters = peft_layer(weight, A, B)
    rows = [t.detach().requires_grad_(backward) for t in x.split(1)]

    def together():
        y = mixed(x, adapter_names=names)
        return (y, torch.autograd.grad(y, [x, *leaves], dy)) if backward else y

    def in_turn():
        made = []
        for i, name in enumerate(names):
            each.set_adapter(name)
            y = each(rows[i])
            made.append(y)
            if backward:
                made += torch.autograd.grad(y, [rows[i], *parameters[2 * i : 2 * i + 2]], dy[i : i + 1])
        return made

    return {"PEFT": together, "PEFT in turn": in_turn}


def linear(x, weight, A, B):
    """One plain layer with the frozen weight: the price line."""
    return F.linear(x, weight)


def forms(case, dtype):
    """{name: fn of (x, weight, A, B)} of the peers that take a case, ctxkern first."""
    found = {
        "ctxkern": functools.partial(lora_linear, scale=SCALE),
        "two bmm": two_bmm,
        "baddbmm": baddbmm,
        "one by one": one_by_one,
    }
    if case.adapters * case.rank <= 1024:
        found["concatenated"] = concatenated
    # copies for every token: where they take at most half a gigabyte
    if 2 * case.adapters * case.rows * case.rank * case.d * dtype.itemsize <= 1 << 29:
        found["repeated"] = repeated
    # strides of whole 16 bytes alone are taken
    if dtype is torch.bfloat16 and case.rank % 8 == 0 and hasattr(F, "grouped_mm"):
        found["grouped_mm"] = grouped
    return found | {"linear": linear}


def calls(case, dtype, backward=True):
    """{name: callable without arguments} that runs each form, forward or forward and backward to x, A and B."""
    x, weight, A, B, dy = inputs_of(case, dtype)
    leaves = [t.requires_grad_(backward) for t in (x, A, B)]

    def step(fn, given):
        y = fn(x, weight, A, B)
        return (y, torch.autograd.grad(y, given, dy)) if backward else y

    run = {
        name: functools.partial(step, fn, leaves[:1] if name == "linear" else leaves)
        for name, fn in forms(case, dtype).items()
    }
    if importlib.util.find_spec("peft") is not None:
        run |= peft_calls(x, weight, A, B, dy, backward)
    return run

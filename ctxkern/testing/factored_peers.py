"""What `factored_modulated_linear` is measured against, each as its users write it, for sequences of a context each."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ctxkern.functional import factored_modulated_linear, modulated_linear


class FactoredCase(NamedTuple):
    """`contexts` contexts of K entries, each with a sequence of `rows` tokens, d_in = d_out = d, factors of a rank."""

    contexts: int
    rows: int
    d: int
    context_dim: int
    rank: int

    @property
    def id(self):
        return f"{self.contexts}x{self.rows}-d{self.d}-k{self.context_dim}-r{self.rank}"


FACTORED_CASES = (
    FactoredCase(32, 128, 256, 64, 64),
    FactoredCase(32, 128, 512, 64, 64),
    FactoredCase(64, 32, 512, 32, 64),
    FactoredCase(16, 128, 1024, 64, 64),
    FactoredCase(32, 128, 1024, 64, 64),
    FactoredCase(8, 128, 2048, 64, 64),
)
NAMES = ("x", "context", "weight", "in_factor", "context_factor", "out_factor")


def inputs_of(case, dtype, seed=0):
    """(the arguments by name, dy)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, fan=1):
        return (torch.randn(*shape, generator=generator) * fan**-0.5).to(dtype)

    u, rows, d, context_dim, rank = case
    shapes = ((u, rows, d), (u, context_dim), (d, d), (d, rank), (context_dim, rank), (rank, d))
    fans = (1, 1, d, d, context_dim, rank)
    given = {name: drawn(*shape, fan=fan) for name, shape, fan in zip(NAMES, shapes, fans, strict=True)}
    return given, drawn(u, rows, d)


def plain(x, context, weight, in_factor, context_factor, out_factor):
    """Three products, a gate and a sum."""
    gate = (context @ context_factor)[:, None]
    return x @ weight + ((x @ in_factor) * gate) @ out_factor


def linears(x, context, weight, in_factor, context_factor, out_factor):
    """The same by F.linear, with the last product added to the first."""
    flat, gate = x.flatten(0, 1), (context @ context_factor)[:, None]
    inner = (F.linear(x, in_factor.mT) * gate).flatten(0, 1)
    return torch.addmm(F.linear(flat, weight.mT), inner, out_factor).view(*x.shape[:2], -1)


def gated_weight(x, context, weight, in_factor, context_factor, out_factor):
    """The weight of each context made whole: in_factor diag(gate) out_factor."""
    gate = (context @ context_factor)[:, None]
    return torch.bmm(x, weight + (in_factor * gate) @ out_factor)


def linear(x, context, weight, in_factor, context_factor, out_factor):
    """One plain layer: the price line."""
    return F.linear(x, weight.mT)


def calls(case, dtype):
    """{name: callable without arguments} that runs each form forward and backward to every operand."""
    given, dy = inputs_of(case, dtype)
    leaves = [t.requires_grad_() for t in given.values()]
    forms = {
        "ctxkern": factored_modulated_linear,
        "plain": plain,
        "linears": linears,
        "gated weight": gated_weight,
        "linear": linear,
    }

    def step(fn, asked):
        y = fn(**given)
        return y, torch.autograd.grad(y, asked, dy)

    run = {
        name: functools.partial(step, fn, [given["x"], given["weight"]] if name == "linear" else leaves)
        for name, fn in forms.items()
    }
    return run | {"bilinear": functools.partial(_whole, case, given, dy)}


@functools.cache
def _tensor(case, dtype):
    return torch.randn(case.d, case.d, case.context_dim).to(dtype).requires_grad_()


def _whole(case, given, dy):
    """`modulated_linear` with the whole tensor: what the factors save."""
    bilinear = _tensor(case, dy.dtype)
    x, context, weight = (given[name] for name in NAMES[:3])
    y = modulated_linear(x, context, weight, bilinear)
    return y, torch.autograd.grad(y, (x, context, weight, bilinear), dy)

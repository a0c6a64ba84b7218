"""torch.func, forward mode and double backward, which go through the reference."""

from functools import partial

import pytest
import torch
from helpers.kinds import PADDED, PER_TOKEN, RAGGED, SHARED

import ctxkern
from ctxkern.reference import modulated_linear_ref
from ctxkern.testing.families import modulated_arguments
from ctxkern.testing.oracle import is_floating

by_kind = pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN], ids=lambda c: c.id)


def loss_of(case, dtype=torch.float64):
    """A function of the floating tensors of a case and their values."""
    arguments, dout = modulated_arguments(case, dtype)
    names = [n for n, t in arguments.items() if is_floating(t)]

    def outputs(fn, *tensors):
        return fn(**(arguments | dict(zip(names, tensors, strict=True))))

    return outputs, [arguments[n] for n in names], dout


@by_kind
def test_func_grad_jacrev_and_jvp(case):
    outputs, tensors, dout = loss_of(case)
    argnums = tuple(range(len(tensors)))

    def weighted(fn, *tensors):
        return (outputs(fn, *tensors) * dout).sum()

    for transform in (partial(torch.func.grad, argnums=argnums), partial(torch.func.jacrev, argnums=argnums)):
        got = transform(partial(weighted, ctxkern.modulated_linear))(*tensors)
        torch.testing.assert_close(got, transform(partial(weighted, modulated_linear_ref))(*tensors))
    tangents = tuple(torch.ones_like(t) for t in tensors)
    got = torch.func.jvp(partial(outputs, ctxkern.modulated_linear), tuple(tensors), tangents)
    torch.testing.assert_close(got, torch.func.jvp(partial(outputs, modulated_linear_ref), tuple(tensors), tangents))


def test_vmap_over_each_argument():
    arguments, _ = modulated_arguments(PADDED, torch.float64)
    for name, t in arguments.items():
        if not is_floating(t):
            continue
        stack = torch.stack([t, t.flip(-1), 2 * t])

        def one(t, name=name):
            return ctxkern.modulated_linear(**(arguments | {name: t}))

        torch.testing.assert_close(torch.func.vmap(one)(stack), torch.stack([one(t) for t in stack]))


def test_vmap_of_grad_gives_a_gradient_a_sample():
    arguments, _ = modulated_arguments(PADDED, torch.float64)

    def loss(bilinear, x, context):
        call = arguments | {"x": x[None], "context": context[None], "bilinear": bilinear}
        return ctxkern.modulated_linear(**call).square().sum()

    x, context, bilinear = (arguments[n] for n in ("x", "context", "bilinear"))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(bilinear, x, context)
    one_by_one = [torch.func.grad(loss)(bilinear, x[b], context[b]) for b in range(PADDED.B)]
    torch.testing.assert_close(each, torch.stack(one_by_one))


@by_kind
def test_forward_mode(case):
    outputs, tensors, _ = loss_of(case)
    leaves = [t.requires_grad_() for t in tensors]
    fn = partial(outputs, ctxkern.modulated_linear)
    torch.autograd.gradcheck(fn, leaves, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)


@by_kind
def test_double_backward_is_that_of_the_reference(case):
    def penalty(fn):
        arguments, dout = modulated_arguments(case, torch.float64)
        leaves = {n: t.requires_grad_() if is_floating(t) else t for n, t in arguments.items()}
        given = [t for t in leaves.values() if is_floating(t)]
        first = torch.autograd.grad(fn(**leaves), given, dout.requires_grad_(), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [*first, dout.grad, *(torch.zeros_like(t) if t.grad is None else t.grad for t in given)]

    torch.testing.assert_close(penalty(ctxkern.modulated_linear), penalty(modulated_linear_ref))


def test_the_same_tensor_given_twice():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bilinear = torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True)

    def fn(x, bilinear):
        return ctxkern.modulated_linear(x, x, bilinear[0], bilinear)

    assert torch.autograd.gradcheck(fn, (x, bilinear))
    assert torch.autograd.gradgradcheck(fn, (x, bilinear))

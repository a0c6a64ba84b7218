"""factored_modulated_linear by the low-rank Triton kernels with gates, on a GPU or in Triton's interpreter."""

import functools

import pytest
import torch

import ctxkern
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.registry import interpreted
from ctxkern.testing.cases import CASES
from ctxkern.testing.families import factored_arguments
from ctxkern.testing.oracle import check_family, differentiate

pytest.importorskip("triton")
if not ctxkern.backends()["triton"]:
    pytest.skip(str(ctxkern.backends()["triton"]), allow_module_level=True)

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = {"f32": (torch.float32, None), "f16": (torch.float16, None), "f16-f32-params": (torch.float16, torch.float32)}
NAMES = ("odd", "shared-uneven", "ragged-shared", "context-per-token", "no-weight")
NAMES += ("empty-batch", "empty-d-in", "empty-d-out", "empty-packed")
BY_ID = {case.id: case for case in CASES}

fn = functools.partial(ctxkern.factored_modulated_linear, backend="triton")


def made(name, rank, *dtypes):
    arguments, dout = factored_arguments(BY_ID[name], rank, *dtypes)
    return {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}, dout.to(DEVICE)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_case_table(dtypes):
    for name in NAMES:
        check_family(fn, factored_modulated_linear_ref, *made(name, 3, *dtypes), name)


@pytest.mark.parametrize("rank", [0, 17, 100])
def test_ranks(rank):
    check_family(fn, factored_modulated_linear_ref, *made("shared-uneven", rank))


def test_each_gradient_alone():
    arguments, dout = made("shared-uneven", 3)
    everything = differentiate(fn, arguments, dout)
    for result in everything:
        leaf = result[1:]
        if arguments.get(leaf) is not None:
            given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
            (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
            assert torch.equal(alone, everything[result]), result


def test_gates_of_a_neighbour_are_noticed():
    arguments, dout = made("shared-uneven", 3)

    def shifted(**tensors):
        return fn(**tensors | {"context": tensors["context"].roll(1, 0)})

    with pytest.raises(AssertionError, match="y: rms error"):
        check_family(shifted, factored_modulated_linear_ref, arguments, dout)

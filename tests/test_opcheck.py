"""The operators as torch.library checks them: schema, fake, autograd, ahead-of-time dispatch."""

import pytest
import torch
from helpers.kinds import CHECKED, PADDED, PER_TOKEN, RAGGED, SHARED
from torch.library import opcheck

import ctxkern
from ctxkern.factored.operands import Operands
from ctxkern.registry import interpreted
from ctxkern.testing.cases import make_inputs
from ctxkern.testing.families import factored_arguments, lora_arguments

ops = torch.ops.ctxkern
by_case = pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.id)
by_kind = pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN], ids=lambda c: c.id)


BACKENDS = [name for name in ("portable", "cpu", "triton") if ctxkern.backends()[name]]


def check_modulated(inputs, projections=1, needs=None, forward=True):
    """Both modulated operators, on every backend that is there."""
    lists = [[t] * projections for t in (inputs.weight, inputs.bilinear, inputs.bias)]
    operands = (inputs.x, inputs.context, *lists, inputs.context_index, inputs.cu_seqlens, 1 << 12)
    for backend in BACKENDS:
        if backend == "triton" and inputs.x.dtype is torch.bfloat16 and interpreted():
            continue
        if forward:
            opcheck(ops.modulated_forward.default, (*operands, backend))
        gradients = needs or needs_of(inputs, projections)
        opcheck(ops.modulated_backward.default, ([inputs.dy] * projections, *operands, backend, gradients))


def needs_of(inputs, projections=1):
    return [
        True,
        True,
        *(t is not None for t in (inputs.weight, inputs.bilinear, inputs.bias) for _ in range(projections)),
    ]


@by_case
def test_modulated_operators(case):
    inputs = make_inputs(case)
    check_modulated(inputs)


@by_kind
def test_modulated_operators_in_bfloat16_with_float32_parameters(case):
    inputs = make_inputs(case, torch.bfloat16, torch.float32)
    check_modulated(inputs)


def test_modulated_operators_with_three_projections():
    inputs = make_inputs(SHARED)
    check_modulated(inputs, 3)


@pytest.mark.parametrize("needed", range(5))
def test_modulated_backward_of_one_gradient(needed):
    inputs = make_inputs(PADDED)
    check_modulated(inputs, needs=[i == needed for i in range(5)], forward=False)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("case", [PADDED, PER_TOKEN, SHARED], ids=lambda c: c.id)
def test_modulated_operators_with_permuted_x(case, order):
    inputs = make_inputs(case)
    inverse = [order.index(i) for i in range(3)]
    inputs.x = inputs.x.permute(order).contiguous().permute(inverse)
    inputs.dy = inputs.dy.permute(order).contiguous().permute(inverse)
    check_modulated(inputs)


@pytest.mark.parametrize("case", [c for c in CHECKED if not c.per_token], ids=lambda c: c.id)
def test_lora_operators(case):
    arguments, dout = lora_arguments(case, 3)
    index, bounds = arguments["adapter_index"], arguments["cu_seqlens"]
    differentiable = [arguments[n] for n in ("x", "weight", "A", "B", "bias")]
    count = len(arguments["A"])
    needs = [t is not None for t in differentiable]
    for backend in ("portable", "cpu"):
        for scales, ranks, seed, dropout in (
            (None, None, None, 0.0),
            (torch.ones(count), torch.full((count,), 2), torch.tensor(3), 0.5),
        ):
            operands = (*differentiable, scales, ranks, seed, index, bounds, 1 << 12, backend, 0.5, dropout)
            opcheck(ops.lora_forward.default, operands)
            opcheck(ops.lora_backward.default, (dout, *operands, needs))


# the interpreter needs seconds for each; lora_linear's are checked in tests/lora/test_lora_triton.py
INTERPRETED = ("shared-uneven",)


@by_case
def test_factored_operators(case):
    arguments, dout = factored_arguments(case, 3)
    tensors = [arguments[name] for name in Operands._fields]
    for backend in BACKENDS if case.id in INTERPRETED else BACKENDS[:2]:
        operands = (*tensors, 1 << 12, backend)
        opcheck(ops.factored_forward.default, operands)
        opcheck(ops.factored_backward.default, (dout, *operands, [t is not None for t in tensors[:7]]))

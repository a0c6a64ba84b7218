"""factored_modulated_linear by the CUDA C++ kernels of the low-rank family, compiled for the CPU by emulation."""

import functools

import pytest
import torch
from helpers.emulated import compiled, emulated, forget, planted

import ctxkern
from ctxkern.factored import operands as factored_operands
from ctxkern.reference import factored_modulated_linear_ref
from ctxkern.testing.cases import CASES, Case
from ctxkern.testing.families import factored_arguments
from ctxkern.testing.oracle import check_family, differentiate

DTYPES = {
    "f32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "f16": (torch.float16, None),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
    "f16-f32-params": (torch.float16, torch.float32),
}
BY_ID = {case.id: case for case in CASES}
NAMES = ("odd", "shared-uneven", "ragged-shared", "ragged-empty-sequences", "context-per-token", "no-weight")
EMPTY = ("empty-batch", "empty-d-in", "empty-d-out", "empty-context", "empty-packed")

fn = functools.partial(ctxkern.factored_modulated_linear, backend="cuda")


@pytest.fixture(scope="module", autouse=True)
def library():
    with emulated() as path:
        yield path


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_case_table(dtypes):
    for name in (*NAMES, *EMPTY):
        arguments, dout = factored_arguments(BY_ID[name], 3, *DTYPES[dtypes])
        check_family(fn, factored_modulated_linear_ref, arguments, dout, name)


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
@pytest.mark.parametrize("rank", [0, 17, 33, 130])
def test_ranks(dtypes, rank):
    case = Case("ranks", 3, 30, 40, 36, 4, rows=2, index=(1, 0, 1))
    arguments, dout = factored_arguments(case, rank, *DTYPES[dtypes])
    arguments |= {name: arguments[name].mT.contiguous().mT for name in ("weight", "in_factor", "out_factor")}
    check_family(fn, factored_modulated_linear_ref, arguments, dout)


@pytest.mark.parametrize("name", ["odd", "ragged-shared", "context-per-token"])
def test_each_gradient_alone(name):
    arguments, dout = factored_arguments(BY_ID[name], 3)
    everything = differentiate(fn, arguments, dout)
    for result in everything:
        leaf = result[1:]
        if arguments.get(leaf) is not None:
            given = arguments | {leaf: arguments[leaf].detach().requires_grad_()}
            (alone,) = torch.autograd.grad(fn(**given), given[leaf], dout)
            assert torch.equal(alone, everything[result]), result


def test_kernels_check_an_index_that_the_call_cannot_read(monkeypatch):
    monkeypatch.setattr(factored_operands, "check_values", lambda _: None)
    arguments, _ = factored_arguments(BY_ID["shared-uneven"], 3)
    arguments["context_index"] = arguments["context_index"] + len(arguments["context"])
    with pytest.raises(RuntimeError, match="outside"):
        fn(**arguments)


KERNELS = "cuda/lora/kernels.h"
PLANTED = {
    "gates of the row before": (KERNELS, "q.gate_of[lines.row(i)]", "q.gate_of[lines.row(i) ? lines.row(i) - 1 : 0]"),
    "gates of the rank before": (KERNELS, "b *= gates[column + 1]", "b *= gates[column]"),
    "dx without gates": (
        KERNELS,
        "      gate(sums, q, lines, first + r, ranks - r);\n      if (leads && q.g)",
        "      if (leads && q.g)",
    ),
    "gradients of gates of g alone": (KERNELS, "{ to *= g; }", "{ to = g; }"),
    "g in the place of h": ("cuda/lora/gradients.h", "of_a ? q.g : q.h", "of_a ? q.g : q.g"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_caught(name, tmp_path, monkeypatch):
    sources = planted(tmp_path, *PLANTED[name])
    monkeypatch.setenv("CTXKERN_CUDA_LIBRARY", str(compiled(tmp_path, sources=sources, changed="lora")))
    forget()
    arguments, dout = factored_arguments(BY_ID["shared-uneven"], 3)
    with pytest.raises((AssertionError, RuntimeError)):
        check_family(fn, factored_modulated_linear_ref, arguments, dout)
    monkeypatch.undo()
    forget()

"""Compiled functions without graph breaks: same numbers, dynamic shapes, a backward that calls the operators."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import ctxkern
from ctxkern.testing.cases import Case
from ctxkern.testing.families import (
    by_projection,
    factored_arguments,
    lora_arguments,
    modulated_arguments,
    qkv_arguments,
)
from ctxkern.testing.oracle import differentiate

PADDED = Case("padded", 3, 5, 6, 8, 4, bias=True)
SHARED = Case("shared", 5, 4, 6, 8, 3, rows=4, index=(3, 0, 3, 1, 0), bias=True)
RAGGED = Case("ragged", 4, 0, 6, 8, 3, lengths=(3, 0, 5, 2))
PER_TOKEN = Case("per-token", 2, 3, 6, 4, 3, per_token=True)
CASES = [PADDED, SHARED, RAGGED, PER_TOKEN]
TABLES = CASES[:3]


def bilinear_arguments(case):
    generator = torch.Generator().manual_seed(0)
    shapes = {"input1": (case.B, case.D), "input2": (case.B, case.K), "weight": (case.E, case.D, case.K)}
    arguments = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return arguments | {"bias": torch.ones(case.E)}, torch.randn(case.B, case.E, generator=generator)


# function, its arguments, the cases it takes, and the operator of its backward
FAMILIES = {
    "modulated_linear": (ctxkern.modulated_linear, modulated_arguments, CASES, "modulated_backward"),
    "modulated_qkv": (by_projection(ctxkern.modulated_qkv), qkv_arguments, CASES, "modulated_backward"),
    "bilinear": (ctxkern.bilinear, bilinear_arguments, [PADDED], "modulated_backward"),
    "lora_linear": (ctxkern.lora_linear, partial(lora_arguments, rank=2), TABLES, "lora_backward"),
    "factored": (ctxkern.factored_modulated_linear, partial(factored_arguments, rank=2), CASES, "factored_backward"),
}
PROBLEMS = [
    pytest.param(fn, make, case, operator, id=f"{name}-{case.id}")
    for name, (fn, make, cases, operator) in FAMILIES.items()
    for case in cases
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler that runs graphs as they are and keeps the operators of ctxkern that forward and backward call."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(
            fw_compiler=partial(self._keep, self.forward), bw_compiler=partial(self._keep, self.backward)
        )

    @staticmethod
    def _keep(calls, graph, _):
        named = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        calls += [name.split(".")[1] for name in named if name.startswith("ctxkern.")]
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "make", "case", "operator"), PROBLEMS)
def test_compiled_equals_eager(fn, make, case, operator, dynamic):
    arguments, dout = make(case)
    recorder = Recorder()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=recorder.backend)
    got, want = differentiate(compiled, arguments, dout), differentiate(fn, arguments, dout)
    torch.testing.assert_close(got, want)
    assert set(recorder.forward) == ({operator.replace("backward", "forward")} if operator else set())
    assert recorder.backward == ([operator] if operator else [])


def test_one_graph_serves_many_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ctxkern.modulated_linear, fullgraph=True, dynamic=True, backend=counter)
    for B, S, D in ((3, 5, 6), (4, 7, 6), (6, 9, 10), (2, 11, 12)):
        arguments, dout = modulated_arguments(Case("size", B, S, D, 8, 4))
        want = differentiate(ctxkern.modulated_linear, arguments, dout)
        torch.testing.assert_close(differentiate(compiled, arguments, dout), want)
    assert counter.frame_count == 1


def test_other_indices_and_bounds_compile_nothing_anew():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ctxkern.modulated_linear, fullgraph=True, backend=counter)
    for index in ((3, 0, 3, 1, 0), (0, 0, 0, 0, 0), (1, 2, 3, 0, 1)):
        arguments, _ = modulated_arguments(Case("index", 5, 4, 6, 8, 3, rows=4, index=index))
        torch.testing.assert_close(compiled(**arguments), ctxkern.modulated_linear(**arguments))
    for lengths in ((3, 0, 5), (2, 2, 4), (8, 0, 0)):
        arguments, _ = modulated_arguments(Case("bounds", 3, 0, 6, 8, 3, lengths=lengths))
        torch.testing.assert_close(compiled(**arguments), ctxkern.modulated_linear(**arguments))
    assert counter.frame_count == 2


def test_strides_of_the_compiled_gradients():
    arguments, dout = modulated_arguments(Case("permuted", 3, 4, 6, 8, 4, bilinear_layout="permuted"))
    arguments["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    compiled = torch.compile(ctxkern.modulated_linear, fullgraph=True, backend="aot_eager")
    got, want = differentiate(compiled, arguments, dout), differentiate(ctxkern.modulated_linear, arguments, dout)
    torch.testing.assert_close(got, want)
    assert {n: t.stride() for n, t in got.items()} == {n: t.stride() for n, t in want.items()}


def test_errors_of_shape_are_raised_while_tracing():
    arguments, _ = modulated_arguments(PADDED)
    arguments["weight"] = arguments["weight"].mT
    compiled = torch.compile(ctxkern.modulated_linear, backend="aot_eager")
    with pytest.raises(ValueError, match="weight has shape"):
        compiled(**arguments)


def test_values_of_an_index_are_checked_by_the_operator():
    arguments, _ = modulated_arguments(SHARED)
    compiled = torch.compile(ctxkern.modulated_linear, fullgraph=True, backend="aot_eager")
    arguments["context_index"][1] = 4
    with pytest.raises(ValueError, match=r"context_index\[1\] is 4; it must be from 0 to 3"):
        compiled(**arguments)

"""Grouping rows by context on a device: nothing read back from it, and the same numbers as on the CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import ctxkern
from ctxkern.lora import portable as lora
from ctxkern.lora.operands import Gradients as LoraGradients
from ctxkern.lora.operands import Operands as LoraOperands
from ctxkern.lora.operands import Options
from ctxkern.modulated import portable
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.modulated.portable import modulated
from ctxkern.reference import lora_linear_ref, modulated_linear_ref
from ctxkern.runtime import rows
from ctxkern.testing.cases import CASES, Case, make_inputs
from ctxkern.testing.families import lora_arguments, modulated_arguments
from ctxkern.testing.oracle import assert_matches, check, check_family, differentiate, is_floating

INDEXED = {
    "more-sequences-than-contexts": Case("gathered", 7, 5, 6, 8, 3, rows=3, index=(2, 0, 2, 2, 0, 0, 2), bias=True),
    "as-many": Case("square", 4, 6, 9, 5, 4, rows=4, index=(3, 3, 0, 1)),
    "more-contexts-than-sequences": Case("picked", 4, 5, 6, 8, 3, rows=9, index=(8, 2, 8, 0), bias=True),
    "one-context": Case("one", 5, 6, 7, 4, 2, rows=1, index=(0,) * 5, weight=False),
    "decode": Case("decode", 6, 1, 8, 8, 4, rows=3, index=(2, 1, 1, 0, 0, 2), bias=True),
    "decode-many": Case("decode-many", 6, 1, 8, 8, 4, rows=30, index=(2, 11, 1, 0, 0, 2)),
}
by_index = pytest.mark.parametrize("case", INDEXED.values(), ids=INDEXED)


class Elsewhere:
    """What stands for an index that cannot be read."""

    device = torch.device("cuda")


def as_on_a_device(x, table_rows, index, cu_seqlens, what="context_index", worth_sharing=None):
    """`group_rows` of a padded batch with its index out of reach."""
    if index is None or cu_seqlens is not None:
        return rows.group_rows(x, table_rows, index, cu_seqlens, what)
    grouped = rows.group_rows(x, table_rows, Elsewhere, None, what)
    used = "spread" if grouped.spread is Elsewhere else "slots"
    assert getattr(grouped, used) is Elsewhere
    return replace(grouped, **{used: index})


@pytest.fixture
def out_of_reach(monkeypatch):
    for module in (modulated, lora):
        monkeypatch.setattr(module, "group_rows", as_on_a_device)


DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float64, None)]


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("workspace", [1, 1 << 10, None])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@by_index
def test_modulated(case, dtypes, workspace):
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, *dtypes))


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("case", [c for c in CASES if c.index is not None and c.lengths is None], ids=lambda c: c.id)
def test_the_case_table(case):
    check(ctxkern.modulated_linear, make_inputs(case))


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@by_index
def test_lora(case, dtypes):
    arguments, dout = lora_arguments(case, 3, *dtypes, weight_dtype=dtypes[1])
    check_family(partial(ctxkern.lora_linear, backend="portable"), lora_linear_ref, arguments, dout)


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("sequences", [1, 512])
def test_gradients_of_a_shared_table_add_up_in_float32(sequences):
    case = Case("shared", sequences, 2, 6, 8, 3, rows=1, index=(0,) * sequences)
    for fn, reference, (arguments, dout) in (
        (ctxkern.modulated_linear, modulated_linear_ref, modulated_arguments(case, torch.bfloat16)),
        (partial(ctxkern.lora_linear, backend="portable"), lora_linear_ref, lora_arguments(case, 2, torch.bfloat16)),
    ):
        got = differentiate(fn, arguments, dout)
        double = {n: t.double() if is_floating(t) else t for n, t in arguments.items()}
        exact = differentiate(reference, double, dout)
        # rounded once: the error of the einsum, which adds up in bfloat16, is no measure here
        rounded = {n: t.to(got[n].dtype) for n, t in exact.items()}
        tables = [n for n in ("dcontext", "dA", "dB") if n in got]
        assert_matches(*({n: results[n] for n in tables} for results in (got, exact, rounded)))


@pytest.fixture
def no_copies(monkeypatch):
    """A tensor made of a list would be copied to the device, which a CUDA graph cannot hold."""
    made = torch.tensor

    def refuse(*args, device=None, **how):
        assert device is None or torch.device(device).type == "cpu", "a list is copied to the device"
        return made(*args, device=device, **how)

    monkeypatch.setattr(torch, "tensor", refuse)


def unreadable(arguments):
    """The same on the meta device, where reading a value raises."""
    return {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}


PER_TOKEN = Case("per-token", 2, 3, 6, 4, 3, per_token=True)
ONE_TOKEN = Case("one-token", 8, 1, 6, 4, 3)


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("workspace", [1, 1 << 10, 1 << 25])
@pytest.mark.parametrize("case", [*INDEXED.values(), PER_TOKEN, ONE_TOKEN], ids=lambda c: c.id)
def test_nothing_is_read_back_from_a_device(case, workspace):
    arguments, dout = modulated_arguments(case)
    made = unreadable(arguments | {"dout": dout})
    x, context, index, dout = (made[n] for n in ("x", "context", "context_index", "dout"))
    weights, bilinears, biases = ([made[n]] for n in ("weight", "bilinear", "bias"))
    operands = Operands(x, context, weights, bilinears, biases, index)
    (y,) = portable.forward(operands, workspace)
    assert (y.device.type, y.shape) == ("meta", dout.shape)
    needs = [True, True, *(t is not None for t in (*weights, *bilinears, *biases))]
    dx, dcontext, dweights, dbilinears, _ = portable.backward([dout], operands, workspace, Gradients.of(needs))
    for grad, t in ((dx, x), (dcontext, context), (dweights[0], weights[0]), (dbilinears[0], bilinears[0])):
        assert grad is t is None or (grad.device, grad.shape) == (t.device, t.shape)


@pytest.mark.usefixtures("no_copies")
@by_index
def test_lora_reads_nothing_back_from_a_device(case):
    arguments, dout = lora_arguments(case, 3)
    made = unreadable(arguments | {"dout": dout})
    x, weight, A, B, bias, index = (made[n] for n in ("x", "weight", "A", "B", "bias", "adapter_index"))
    constants = {"scales": torch.empty(len(A), device="meta"), "ranks": torch.empty(len(A), device="meta").long()}
    constants["seed"] = torch.empty((), device="meta").long()
    for operands, dropout in (
        (LoraOperands(x, weight, A, B, bias, adapter_index=index), 0.0),
        (LoraOperands(x, weight, A, B, bias, adapter_index=index, **constants), 0.5),
    ):
        options = Options(1 << 10, None, 0.5, dropout)
        y = lora.forward(operands, options)
        assert y.shape == dout.shape
        needs = LoraGradients.of([t is not None for t in (x, weight, A, B, bias)])
        dx, _, dA, dB, _ = lora.backward(made["dout"], operands, options, needs)
        assert (dx.shape, dA.shape, dB.shape) == (x.shape, A.shape, B.shape)


def test_reading_back_would_fail():
    arguments, _ = modulated_arguments(Case("packed", 2, 0, 3, 4, 2, lengths=(1, 2)))
    x, bounds = arguments["x"], arguments["cu_seqlens"].to("meta")
    # torch's own words for reading a value of the meta device
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        rows.group_rows(x, 2, None, bounds)

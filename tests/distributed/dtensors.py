"""Calls whose operands are DTensors equal those with the whole tensors, however they divide over a mesh."""

from functools import partial

import pytest
import torch
from helpers.processes import full
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import ctxkern
from ctxkern.testing.cases import Case
from ctxkern.testing.families import (
    by_projection,
    factored_arguments,
    lora_arguments,
    modulated_arguments,
    qkv_arguments,
)
from ctxkern.testing.oracle import differentiate, is_floating

SHARED = Case("shared", 6, 5, 8, 12, 4, rows=3, index=(2, 0, 2, 1, 0, 2), bias=True)
OWN = Case("own", 4, 6, 8, 12, 4, bias=True)
RAGGED = Case("ragged", 4, 0, 8, 12, 3, lengths=(3, 0, 5, 2), bias=True)
PER_TOKEN = Case("per-token", 4, 6, 8, 12, 3, per_token=True)
WHOLE, SUM = Replicate(), Partial()


def modulated(case):
    return ctxkern.modulated_linear, *modulated_arguments(case, torch.float64)


def qkv(case):
    # widths of grouped queries
    return by_projection(ctxkern.modulated_qkv), *qkv_arguments(case, torch.float64, widths=(12, 6, 6))


def lora(case, **how):
    arguments, dout = lora_arguments(case, 3, torch.float64)
    how["scale"] = arguments.pop("scale")
    if case is SHARED:
        how |= {"scale": torch.tensor([0.5, 2.0, 1.0]), "ranks": torch.tensor([3, 1, 2])}
        arguments["adapter_index"] = torch.tensor([2, -1, 2, 1, 0, 2])
    return partial(ctxkern.lora_linear, **how), arguments, dout


def factored(case):
    return ctxkern.factored_modulated_linear, *factored_arguments(case, 3, torch.float64)


COLUMNS = {"x": WHOLE, "weight": Shard(1), "bilinear": Shard(1), "bias": Shard(0)}
ROWS = {"x": Shard(2), "weight": Shard(0), "bilinear": Shard(0), "bias": WHOLE}
LORA_COLUMNS = {"x": WHOLE, "weight": Shard(0), "A": WHOLE, "B": Shard(1), "bias": Shard(0)}
LORA_ROWS = {"x": Shard(2), "weight": Shard(1), "A": Shard(2), "B": WHOLE, "bias": WHOLE}
FACTORED_COLUMNS = {"x": WHOLE, "weight": Shard(1), "out_factor": Shard(1), "bias": Shard(0)}
FACTORED_ROWS = {"x": Shard(2), "weight": Shard(0), "in_factor": Shard(0), "context_factor": WHOLE}
QKV_COLUMNS = {"x": WHOLE} | {f"{n}{i}": COLUMNS[n] for n in ("weight", "bilinear", "bias") for i in range(3)}
QKV_ROWS = {"x": Shard(2)} | {f"{n}{i}": ROWS[n] for n in ("weight", "bilinear", "bias") for i in range(3)}
BATCH = {"x": Shard(0), "context_index": Shard(0)}

# what is called, how its operands lie (those that are not named: plain), how its output must
CALLS = {
    "columns": (modulated(SHARED), COLUMNS, Shard(2)),
    "rows": (modulated(SHARED), ROWS, SUM),
    "rows, the rest plain": (modulated(SHARED), {"x": Shard(2), "weight": Shard(0)}, SUM),
    "batch": (modulated(SHARED), BATCH, Shard(0)),
    "batch, contexts in order": (modulated(OWN), {"x": Shard(0), "context": Shard(0)}, Shard(0)),
    "sequence": (modulated(SHARED), {"x": Shard(1)}, Shard(1)),
    "sequence, a context per token": (modulated(PER_TOKEN), {"x": Shard(1), "context": Shard(1)}, Shard(1)),
    "packed columns": (modulated(RAGGED), COLUMNS, Shard(1)),
    "packed rows of x": (modulated(RAGGED), {"x": Shard(0)}, None),
    "everything whole": (modulated(SHARED), dict.fromkeys(COLUMNS, WHOLE), WHOLE),
    "bilinear along K": (modulated(SHARED), {"x": WHOLE, "bilinear": Shard(2)}, None),
    "at odds": (modulated(SHARED), COLUMNS | {"x": Shard(1), "bilinear": Shard(0)}, None),
    "qkv columns": (qkv(SHARED), QKV_COLUMNS, Shard(2)),
    "qkv rows": (qkv(SHARED), QKV_ROWS, SUM),
    "lora columns": (lora(SHARED), LORA_COLUMNS, Shard(2)),
    "lora rows": (lora(SHARED), LORA_ROWS, SUM),
    "lora batch": (lora(SHARED), {"x": Shard(0), "adapter_index": Shard(0)}, Shard(0)),
    "lora batch, adapters in order": (lora(OWN), {"x": Shard(0)}, Shard(0)),
    "lora columns, dropout": (lora(SHARED, dropout=0.5, seed=3), LORA_COLUMNS, Shard(2)),
    "lora rows, dropout": (lora(SHARED, dropout=0.5, seed=3), LORA_ROWS, None),
    "lora packed rows": (lora(RAGGED), {"x": Shard(1), "weight": Shard(1), "A": Shard(2)}, SUM),
    "factored columns": (factored(SHARED), FACTORED_COLUMNS, Shard(2)),
    "factored rows": (factored(SHARED), FACTORED_ROWS, SUM),
    "factored sequence, a context per token": (factored(PER_TOKEN), {"x": Shard(1)}, Shard(1)),
}


def calls_divide(_rank, world, _folder, calls=CALLS):
    mesh = init_device_mesh("cpu", (world,))
    for name, ((fn, arguments, dout), where, expected) in calls.items():
        compare(name, fn, arguments, dout, {n: [placement] for n, placement in where.items()}, mesh, expected)


def compare(name, fn, arguments, dout, where, mesh, expected=None):
    want = differentiate(fn, arguments, dout)
    outputs = []

    def distributed(**tensors):
        outs = fn(**{n: place(t, where.get(n), mesh) for n, t in tensors.items()})
        outputs.extend([outs] if isinstance(outs, torch.Tensor) else outs)
        return full(outs) if isinstance(outs, torch.Tensor) else tuple(map(full, outs))

    torch.testing.assert_close(differentiate(distributed, arguments, dout), want, msg=lambda text: f"{name}: {text}")
    for y in outputs:
        assert expected is None or y.placements == (expected,), f"{name}: y lies as {y.placements}"
    leaves = {n: place(t, where.get(n), mesh) for n, t in arguments.items()}
    leaves = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in leaves.items()}
    outs = fn(**leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    sum(full(y).sum() for y in outs).backward()
    for n, t in leaves.items():
        if is_floating(t) and n != "x":
            assert getattr(t.grad, "placements", None) == getattr(t, "placements", None), f"{name}: d{n}"


def place(t, placements, mesh):
    if placements is None or not isinstance(t, torch.Tensor):
        return t
    whole = DTensor.from_local(t, mesh, [WHOLE] * mesh.ndim)
    return whole.redistribute(mesh, placements)


def gradients_of_gradients(_rank, world, _folder):
    mesh = init_device_mesh("cpu", (world,))
    fn, arguments, _ = modulated(SHARED)

    def penalty(where):
        leaves = {n: place(t, where.get(n), mesh) for n, t in arguments.items()}
        leaves = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in leaves.items()}
        (dx,) = torch.autograd.grad(full(fn(**leaves)).square().sum(), leaves["x"], create_graph=True)
        full(dx).square().sum().backward()
        return {n: full(t.grad) for n, t in leaves.items() if is_floating(t) and t.grad is not None}

    for where in (COLUMNS, ROWS, BATCH):
        torch.testing.assert_close(penalty({n: [placement] for n, placement in where.items()}), penalty({}))


def one_output_of_three(_rank, world, _folder):
    """The gradients of the others are zeros that autograd makes, plain ones."""
    mesh = init_device_mesh("cpu", (world,))
    fn, arguments, douts = qkv(SHARED)
    found = []
    for where in ({}, QKV_COLUMNS):
        leaves = {n: place(t, [where[n]] if n in where else None, mesh) for n, t in arguments.items()}
        leaves = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in leaves.items()}
        full(fn(**leaves)[1]).backward(douts[1])
        found.append({n: full(t.grad) for n, t in leaves.items() if is_floating(t)})
    torch.testing.assert_close(*found)


def what_cannot_be(_rank, world, _folder):
    mesh = init_device_mesh("cpu", (world,))
    fn, arguments, _ = modulated(SHARED)
    with pytest.raises(ValueError, match="x is a plain tensor beside parameters that are DTensors; it must be"):
        fn(**arguments | {"weight": place(arguments["weight"], [Shard(1)], mesh)})
    other = init_device_mesh("cpu", (1, world))
    given = {"x": place(arguments["x"], [WHOLE], mesh), "weight": place(arguments["weight"], [WHOLE] * 2, other)}
    with pytest.raises(ValueError, match="operands are DTensors on .* and on others; they must all be on one mesh"):
        fn(**arguments | given)


def halves_beside_float32(_rank, world, _folder):
    """The operands keep their dtypes: a table and adapters in float32 beside halves."""
    mesh = init_device_mesh("cpu", (world,))
    arguments, _ = lora_arguments(SHARED, 3, torch.bfloat16, torch.float32)
    where = {n: [LORA_ROWS[n]] for n in LORA_ROWS}
    given = {n: place(t, where.get(n), mesh) for n, t in arguments.items()}
    given["A"] = distribute_tensor(arguments["A"], mesh, where["A"]).requires_grad_()
    y = ctxkern.lora_linear(**given)
    y.full_tensor().float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert given["A"].grad.dtype is torch.float32
    assert given["A"].grad.placements == (Shard(2),)


def compiles(_rank, world, _folder):
    mesh = init_device_mesh("cpu", (world,))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            fn, arguments, _ = modulated(SHARED)
            self.weight, self.bilinear = (
                nn.Parameter(distribute_tensor(arguments[n], mesh, [Shard(1)])) for n in ("weight", "bilinear")
            )

        def forward(self, x, context, index):
            return ctxkern.modulated_linear(x, context, self.weight, self.bilinear, context_index=index).redistribute(
                mesh, [WHOLE]
            )

    layer, (_, arguments, dout) = Layer(), modulated(SHARED)
    given = [place(arguments[n], [WHOLE], mesh) for n in ("x", "context", "context_index")]
    found = []
    for fn in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = fn(*given)
        y.to_local().backward(dout)
        found.append((full(y).detach(), full(layer.weight.grad), full(layer.bilinear.grad)))
    torch.testing.assert_close(*found)


def over_a_grid(_rank, world, _folder):
    """Two dimensions of a mesh: over both of columns and rows, or the batch and columns."""
    mesh = init_device_mesh("cpu", (2, world // 2))
    columns_and_rows = {n: [ROWS[n], COLUMNS[n]] for n in ROWS}
    compare("rows, columns", *modulated(SHARED), columns_and_rows, mesh)
    columns_twice = {n: [COLUMNS[n]] * 2 for n in COLUMNS}
    compare("columns twice", *modulated(SHARED), columns_twice, mesh)
    batch_and_columns = {n: [BATCH.get(n, WHOLE), LORA_COLUMNS.get(n, WHOLE)] for n in (*LORA_COLUMNS, "adapter_index")}
    compare("batch, columns", *lora(SHARED), batch_and_columns, mesh)

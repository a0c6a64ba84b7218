"""Calls whose operands are DTensors: how the operators divide over the processes of a device mesh.

Every dimension of every tensor of a call has a name: x is BSD, weight DE, y BSE. Along a dimension of the mesh a call
divides over one name, as an einsum does: operands with that name are sharded there, the others replicated; results with
it come out sharded, results without it as partial sums. Over E that is column-wise parallel, over D row-wise, over B or
S data or sequence parallel. What moves the fewest bytes is taken.

Imported with the first DTensor that a call is given: `import ctxkern` does not load torch.distributed.tensor.
"""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._pytree import tree_flatten, tree_unflatten

from .lora.operands import Operands as LoraOperands


class Names(NamedTuple):
    """A string for each tensor, a letter for each of its dimensions; "" for one that no call divides."""

    operands: list  # as the operator takes them
    outputs: list
    widths: list  # E of each output
    splits: str  # what the call can divide over


def _spans(index, cu_seqlens):
    """(leading dimensions of x, first dimension of a table, what the call can divide over)."""
    if cu_seqlens is not None:
        return "N", "F", "ED"
    return "BS", "B" if index is None else "F", "EDBS"


def _modulated(x, context, weights, bilinears, biases, index, cu_seqlens, *_):
    lead, row, splits = _spans(index, cu_seqlens)
    table, n = "BSK" if context.dim() == 3 else row + "K", len(bilinears)
    operands = [lead + "D", table, ["DE"] * n, ["DEK"] * n, ["E"] * n, "B", ""]
    return Names(operands, [lead + "E"] * n, [t.shape[1] for t in bilinears], splits)


def _lora(*args):
    call, dropout = LoraOperands(*args[: len(LoraOperands._fields)]), args[-1]
    lead, row, splits = _spans(call.adapter_index, call.cu_seqlens)
    operands = [lead + "D", "ED", row + "rD", row + "Er", "E", row, row, "", "B", ""]
    # the mask of dropout goes by the rows and columns of the whole x
    return Names(operands, [lead + "E"], [call.B.shape[1]], "E" if dropout else splits)


def _factored(x, context, weight, in_factor, context_factor, out_factor, bias, index, cu_seqlens, *_):
    lead, row, splits = _spans(index, cu_seqlens)
    table = "BSK" if context.dim() == 3 else row + "K"
    operands = [lead + "D", table, "DE", "DR", "KR", "RE", "E", "B", ""]
    return Names(operands, [lead + "E"], [out_factor.shape[1]], splits)


def _bias_of_partial_sums(name, split):
    """Whether a tensor is the bias, or its gradient, of a call that divides over D: the one operand that every product
    lacks and the sum of them has once."""
    return split == "D" and name == "E"


def _operand(name, split):
    return Shard(name.index(split)) if split and split in name else Replicate()


def _result(name, split):
    if split is None or split in name or _bias_of_partial_sums(name, split):
        return _operand(name, split)
    return Partial()


def _moved(t, before, after, size):
    """(bytes that a process receives, 1 where anything changes), about, to bring a tensor from a placement to another
    along a dimension of the mesh."""
    if before == after:
        return 0, 0
    total = t.numel() * t.element_size()
    if before.is_replicate():
        return 0, 1
    if before.is_partial():
        return total * (2 if after.is_replicate() else 1), 1
    return total / (1 if after.is_replicate() else size), 1


def _chosen(dtensors, names, splits, dim, size):
    """What a call divides over along a dimension of the mesh, None for nothing."""

    def cost(split):
        each = [_moved(t, t.placements[dim], _operand(n, split), size) for t, n in zip(dtensors, names, strict=True)]
        return tuple(map(sum, zip(*each, strict=True)))

    return min((None, *splits), key=cost)


def _mesh(tensors):
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(f"operands are DTensors on {meshes[0]} and on others; they must all be on one mesh")
    return meshes[0]


def replicated(t, mesh):
    """A DTensor of a plain tensor that is the same on all processes; anything else as it is."""
    if not isinstance(t, torch.Tensor) or isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Divided:
    """A call of an operator with DTensors, divided over their mesh."""

    def __init__(self, names, given, args):
        self.tensors, self.structure = tree_flatten(args)
        self.names, _ = tree_flatten(given)
        self.mesh = _mesh(self.tensors)
        known = [(t, n) for t, n in zip(self.tensors, self.names, strict=True) if isinstance(t, DTensor)]
        each = (_chosen(*zip(*known, strict=True), names.splits, i, self.mesh.size(i)) for i in range(self.mesh.ndim))
        self.splits = list(each)

    def local(self, bias_once):
        """The arguments of this process. bias_once: on the first of those whose results are summed, zeros elsewhere."""
        found = list(self.tensors)
        for i, (t, name) in enumerate(zip(self.tensors, self.names, strict=True)):
            if not isinstance(t, torch.Tensor):
                continue
            whole = replicated(t, self.mesh)
            found[i] = whole.redistribute(self.mesh, [_operand(name, split) for split in self.splits]).to_local()
            at = zip(self.splits, self.mesh.get_coordinate(), strict=True)
            if bias_once and any(rank and _bias_of_partial_sums(name, split) for split, rank in at):
                found[i] = torch.zeros_like(found[i])
        return tree_unflatten(found, self.structure)

    def dtensor(self, local, name, shape):
        """A result of this process as a part of the whole one, whose dimensions lie in memory in the same order."""
        strides, step = [0] * len(shape), 1
        for dim in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
            strides[dim], step = step, step * max(shape[dim], 1)
        placements = [_result(name, split) for split in self.splits]
        shape = torch.Size(shape)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=tuple(strides))

    def gradient(self, local, at):
        """That of the tensor at this place; partial sums of all but x are reduced, to the placements of the operand."""
        t = self.tensors[at]
        whole = self.dtensor(local, self.names[at], t.shape)
        if self.names[at] in ("BSD", "ND"):
            return whole
        before = replicated(t, self.mesh).placements
        return whole.redistribute(self.mesh, [Replicate() if p.is_partial() else p for p in before])


def _positional(func, args, kwargs):
    return [*args, *(kwargs[a.name] for a in func._schema.arguments[len(args) :])]


def _register(family, describe):
    def forward(_cls, func, _types, args, kwargs=None):
        args = _positional(func, args, kwargs or {})
        names = describe(*args)
        n = len(names.operands)
        with torch.no_grad():
            call = _Divided(names, names.operands, args[:n])
            found = func(*call.local(bias_once=True), *args[n:])
            lead = args[0].shape[:-1]
            if isinstance(found, torch.Tensor):
                return call.dtensor(found, names.outputs[0], (*lead, names.widths[0]))
            outs = zip(found, names.outputs, names.widths, strict=True)
            return [call.dtensor(t, name, (*lead, width)) for t, name, width in outs]

    def backward(_cls, func, _types, args, kwargs=None):
        douts, *args, needs = _positional(func, args, kwargs or {})
        names = describe(*args)
        n, several = len(names.operands), isinstance(douts, list | tuple)
        with torch.no_grad():
            call = _Divided(
                names, [names.outputs if several else names.outputs[0], *names.operands], [douts, *args[:n]]
            )
            found = func(*call.local(bias_once=False), *args[n:], needs)
            first = len(douts) if several else 1
            at = [first + i for i, need in enumerate(needs) if need]
            return [call.gradient(t, i) for t, i in zip(found, at, strict=True)]

    torch.library.register_torch_dispatch(f"ctxkern::{family}_forward", DTensor, forward)
    torch.library.register_torch_dispatch(f"ctxkern::{family}_backward", DTensor, backward)


for _family, _describe in (("modulated", _modulated), ("lora", _lora), ("factored", _factored)):
    _register(_family, _describe)


def together(tensors):
    """The tensors of a call, plain ones beside DTensors as replicated DTensors; x comes first, gradients of plain ones
    are plain.

    Raises:
        ValueError: x is plain, or they lie on several meshes.
    """
    mesh = _mesh(tensors)
    if not isinstance(tensors[0], DTensor):
        raise ValueError(
            "x is a plain tensor beside parameters that are DTensors; it must be a DTensor too: "
            "DTensor.from_local(x, mesh, [Replicate()]), where all processes have the same x"
        )
    return tuple(replicated(t, mesh) for t in tensors)

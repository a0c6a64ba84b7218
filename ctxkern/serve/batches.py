"""Which contexts a batch has, known by their values, and its products with the slots that they were given."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .stamps import Stamp


@dataclass(eq=False)
class Plan:
    """slots: of all contexts of a batch. order: the sequences by slot, inverse: the way back; None where they lie so.
    runs: products of neighbouring slots of a chunk with equally many sequences each."""

    slots: frozenset[int]
    order: Tensor | None
    inverse: Tensor | None
    runs: list[Run]


class Run(NamedTuple):
    """Slots first..first + count of a chunk, for `each` sequences each, from the sequence `start` of the order on."""

    chunk: int
    first: int
    count: int
    start: int
    each: int


@dataclass(eq=False)
class Batch:
    """rows: {the values of a context: its row in the table}. of: for each sequence the number of its context there."""

    rows: dict[bytes, int]
    of: list[int]
    device: torch.device
    stamp: Stamp | None
    plan: Plan | None = None
    epoch: int = -1


class Batches:
    """The batches that a thread has met last, so that a table is read once and not by every layer."""

    LAST = 8

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, context: Tensor, index: Tensor | None, size: int) -> Batch | None:
        """The batch of `size` sequences; None where the index does not fit it.

        context: [F, K]. index: [b] int64 or None; each entry stands for size / b sequences.
        """
        tensors = [context] if index is None else [context, index]
        if any(t.is_inference() for t in tensors):
            return _read(context, index, size, None)
        last = self._local.__dict__.setdefault("last", {})
        key = (*map(id, tensors), size)
        found = last.get(key)
        if found is None or not found.stamp.holds(tensors):
            found = _read(context, index, size, Stamp(tensors))
            if found is not None:
                if len(last) >= self.LAST:
                    del last[next(iter(last))]
                last[key] = found
        return found


def _read(context: Tensor, index: Tensor | None, size: int, stamp: Stamp | None) -> Batch | None:
    if index is not None and (index.dim() != 1 or index.dtype is not torch.int64):
        return None
    table = range(len(context)) if index is None else index.tolist()
    if not table or size % len(table) or min(table) < 0 or max(table) >= len(context):
        return None
    distinct = list(dict.fromkeys(table))
    values = context.detach() if index is None else context.detach()[torch.tensor(distinct, device=context.device)]
    raw = values.to("cpu").contiguous().view(torch.uint8).tolist()
    kind = str(context.dtype).encode()
    keys = {row: kind + bytes(each) for row, each in zip(distinct, raw, strict=True)}
    rows: dict[bytes, int] = {}
    for row, key in keys.items():
        rows.setdefault(key, row)
    number = {key: i for i, key in enumerate(rows)}
    of = [number[keys[row]] for row in table for _ in range(size // len(table))]
    return Batch(rows, of, context.device, stamp)


def plan_of(batch: Batch, slots: list[int], places: list[tuple[int, int]]) -> Plan:
    """The plan of a batch whose contexts have these slots, in its order; places: of each slot its chunk and number."""
    members: dict[int, list[int]] = {}
    for sequence, number in enumerate(batch.of):
        members.setdefault(slots[number], []).append(sequence)
    sequences = [sequence for slot in sorted(members) for sequence in members[slot]]
    order = inverse = None
    if sequences != list(range(len(sequences))):
        with torch.inference_mode(False):
            order = torch.tensor(sequences, device=batch.device)
            inverse = torch.argsort(order)
    runs: list[Run] = []
    start = 0
    for slot in sorted(members):
        (chunk, at), each = places[slot], len(members[slot])
        last = runs[-1] if runs else None
        if last is not None and (last.chunk, last.first + last.count, last.each) == (chunk, at, each):
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(Run(chunk, at, 1, start, each))
        start += each
    return Plan(frozenset(slots), order, inverse, runs)


def project(x: Tensor, plan: Plan, chunks: dict[int, Tensor], d_out: int) -> Tensor:
    """y [B, S, E] of x [B, S, D] by weights in slots; chunks: {number: [slots, D, E]}."""
    size, seq, _ = x.shape
    x = x if plan.order is None else x.index_select(0, plan.order)
    y = x.new_empty(size, seq, d_out)
    for run in plan.runs:
        weights = chunks[run.chunk][run.first : run.first + run.count]
        rows = slice(run.start, run.start + run.count * run.each)
        shape = (run.count, run.each * seq, -1)
        torch.bmm(x[rows].reshape(shape), weights, out=y[rows].view(shape))
    return y if plan.inverse is None else y.index_select(0, plan.inverse)

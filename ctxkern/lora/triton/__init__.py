"""Triton kernels of the low-rank update around torch's own product with the base weight; launches are kept.

update.py and gradients.py have the maths, the kernels and their launchers.
"""

from typing import NamedTuple

import torch

from ctxkern.lora.operands import Gradients, check_values, new_gradients, new_output, without_gaps
from ctxkern.plan import forced, rounds_to_tf32
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.launches import kept, layout_of

from .call import Call, Numbers, Update
from .gradients import add_gradients
from .update import add_update

__all__ = ["backward", "forward"]


class Into(NamedTuple):
    """Where gradients go; None: not asked for."""

    x: torch.Tensor | None = None  # [N, D]
    A: torch.Tensor | None = None  # [b, R, D], rows of adapters in use
    B: torch.Tensor | None = None  # [b, E, R], likewise
    products: torch.Tensor | None = None  # [N, R] float32: of the gates of each row of x


def _of(operands, options, gates):
    """(`Update`, `Numbers`) of a call."""
    x, _, A, B, _, scales, ranks, seed, index, bounds = operands
    dropout = options.dropout
    numbers = Numbers(options.scale / (1 - dropout), round(dropout * 2**32))
    values, rows = (None, None) if gates is None else gates[:2]
    return Update(x, A, B, scales, ranks, seed if dropout else None, values, rows, index, bounds), numbers


def forward(operands, options, gates=None):
    """y in the dtype of x and the leading shape of x."""
    check_values(operands)
    operands = without_gaps(operands)
    y, adds = new_output(operands, options.workspace_bytes)
    if _is_nothing(operands):
        _clear(y, adds)
    else:
        _run(_update, *_of(operands, options, gates), (y,), adds)
    return y.view(*operands.x.shape[:-1], y.shape[1])


def backward(dout, operands, options, needs, gates=None):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    operands, dy = without_gaps(operands), dout.contiguous().flatten(0, -2)
    dx, adds, dweight, dbias = new_gradients(dy, operands, needs, options.workspace_bytes)
    # kernels write the rows of adapters in use
    whole = operands.adapter_index is None and operands.cu_seqlens is None and not _is_nothing(operands)
    new = torch.empty if whole else torch.zeros
    dA, dB = (
        new(t.shape, dtype=t.dtype, device=t.device) if need else None
        for t, need in ((operands.A, needs.A), (operands.B, needs.B))
    )
    into = Into(dx, dA, dB, None if gates is None else gates.products)
    if _is_nothing(operands):
        _clear(dx, adds)
        _clear(into.products, False)
    elif any(t is not None for t in into):
        _run(_gradients, *_of(operands, options, gates), (dy, *into), adds)
    return Gradients(dx if dx is None else dx.view(operands.x.shape), dweight, dA, dB, dbias)


def _is_nothing(operands):
    return 0 in (operands.x.numel(), operands.A.numel(), operands.B.numel())


def _clear(t, adds):
    if t is not None and not adds:
        t.zero_()


def _update(call, y, adds):
    add_update(call, y[0], adds)


def _gradients(call, tensors, adds):
    add_gradients(call, tensors[0], Into(*tensors[1:]), adds)


# launches by all that they depend on; what names the tile of groups
_KEPT, _NAMES = {}, {_update: "lora_y", _gradients: "lora_dx"}
tiles.AFTER.append(_KEPT.clear)


def _run(lay_out, operands, numbers, others, adds):
    device = operands.x.device
    tensors = [*operands, *others]
    switches = tuple(forced.tiles.items()), rounds_to_tf32(operands.x.dtype)
    key = (lay_out, numbers, adds, device, switches, *map(layout_of, tensors))

    def laid_out(layout, stand_ins):
        given = Update(*stand_ins[: len(operands)])
        lay_out(Call(given, numbers, _NAMES[lay_out], device, layout), stand_ins[len(operands) :], adds)

    kept(_KEPT, key, tensors, laid_out).run(tensors, device)

"""What a low-rank call is given and gives back.

A backend is a module of this folder with

    forward(operands, scale, workspace_bytes) → y                          dtype and leading shape of x
    backward(dout, operands, scale, workspace_bytes, needs) → Gradients

All tensors that reach it are plain (`ctxkern.ops`).
"""

from typing import Any, NamedTuple

import torch


class Operands(NamedTuple):
    """x [B, S, D] or packed [N, D]; weight [E, D] or None; A [b, r, D]; B [b, E, r]; bias [E] or None."""

    x: torch.Tensor
    weight: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    adapter_index: torch.Tensor | None = None  # [B]
    cu_seqlens: torch.Tensor | None = None  # [B + 1]

    def flat(self):
        return tuple(self)

    @classmethod
    def of(cls, flat):
        return cls(*flat)


class Gradients(NamedTuple):
    """One entry per operand that has a gradient. As `needs`: whether it is asked for. Absent ones are None."""

    x: Any
    weight: Any
    A: Any
    B: Any
    bias: Any

    @classmethod
    def of(cls, flat):
        return cls(*flat)

    def flat(self):
        return tuple(self)

"""What a strategy is given and what it gives back."""

from dataclasses import dataclass

import torch

from ctxkern.runtime.rows import Rows


@dataclass(slots=True)
class Call:
    """One projection: grouped rows of x [N, D], contexts [U, K] (one per row, [N, K], for outer) and its parameters."""

    x: torch.Tensor
    contexts: torch.Tensor
    rows: Rows
    weight: torch.Tensor | None
    bilinear: torch.Tensor
    compute: torch.dtype


@dataclass(slots=True)
class Partial:
    """Which gradients a backward makes, and then those gradients.

    x: [N, D] in grouped order and the compute dtype, added to where an earlier projection has begun it.
    contexts: of each context [U, K], each sequence [B, K] (spread) or each row [N, K] (outer).
    """

    x: torch.Tensor | None
    need_x: bool
    need_contexts: bool
    need_weight: bool
    need_bilinear: bool
    contexts: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bilinear: torch.Tensor | None = None

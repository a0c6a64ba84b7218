"""The weights of contexts by blocks of rows of D, W[u, d, e] = weight[d, e] + Σ_k bilinear[d, e, k] context[u, k].

A block of `bilinear` is cast to the dtype of the sum; int8 is multiplied by its scales [D, E] after the sum over k.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# bytes of a block: the cast one stays in cache (bench/LOG.md: int8)
BLOCK = 1 << 20


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where a tensor of floats has it."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def blocks(
    weight: Tensor | None, values: Tensor, scales: Tensor | None, contexts: Tensor, limit: int = BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the weights [U, rows, E] of contexts [U, K]) in the dtype of `contexts`, float32 or wider.

    Args:
        weight: [D, E] or None. values: [D, E, K], of floats or int8 with scales [D, E]. limit: bytes of a block and its
            weights, one row at least.
    """
    d_in, d_out, context_dim = values.shape
    wide = contexts.dtype
    step = rows_of_a_block(values, contexts, limit)
    for start in range(0, d_in, step):
        rows = slice(start, min(start + step, d_in))
        # [rows · E, K]
        block = values[rows].reshape(-1, context_dim).to(wide)
        flat = None if weight is None else weight[rows].reshape(1, -1).to(wide)
        if scales is None and flat is not None:
            made = torch.addmm(flat, contexts, block.t())
        else:
            made = torch.mm(contexts, block.t())
            if scales is not None:
                made *= scales[rows].reshape(1, -1).to(wide)
            if flat is not None:
                made += flat
        yield rows, made.view(len(contexts), -1, d_out)


def rows_of_a_block(values: Tensor, contexts: Tensor, limit: int = BLOCK) -> int:
    """Rows of D in a block."""
    _, d_out, context_dim = values.shape
    return max(limit // max(d_out * (context_dim + len(contexts)) * contexts.dtype.itemsize, 1), 1)

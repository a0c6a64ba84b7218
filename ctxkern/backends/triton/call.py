"""What all launches of one call share: rows as a matrix, contexts, groups, precision."""

from contextlib import nullcontext
from functools import cached_property

import torch
import triton.language as tl

from ctxkern import planner
from ctxkern.backends.shared import contiguous

from . import tiles
from .grouping import group_rows, slot_of_rows

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def as_matrix(t):
    """[N, last dimension], dense."""
    return contiguous(t).view(t.shape[:-1].numel(), t.shape[-1])


def strides(t, dims):
    return (0,) * dims if t is None else t.stride()


class Call:
    """x [N, D], context [F, K]; sequences: B, length: rows of each, 0 where `cu_seqlens` has their bounds."""

    def __init__(self, x, context, bilinears, context_index, cu_seqlens, workspace_bytes):
        self.x, self.context = as_matrix(x), as_matrix(context)
        self.tokens, self.d_in = self.x.shape
        self.table, self.context_dim = self.context.shape
        self.index, self.bounds = contiguous(context_index), contiguous(cu_seqlens)
        self.per_token = context.dim() == 3
        if self.per_token:
            self.sequences, self.length = self.tokens, 1
        elif cu_seqlens is None:
            self.sequences, self.length = x.shape[:2]
        else:
            self.sequences, self.length = cu_seqlens.shape[0] - 1, 0
        self.budget, self.dtype = workspace_bytes, x.dtype
        wide = any(t.dtype is not x.dtype for t in (context, *bilinears))
        kind = tiles.kind_of(x.dtype, torch.float32 if wide else x.dtype)
        sizes = (self.d_in, *(t.shape[1] for t in bilinears))
        aligned = all(size * x.element_size() % 16 == 0 for size in sizes)
        self.target = kind, tiles.architecture(x.device), aligned
        persistent = planner.GPU_PERSISTENT
        self.persistent = tiles.persistent(*self.target) if persistent is None else persistent
        tf32 = x.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 else "ieee"
        # of float32 products beside halves: three products of the matrix unit, where it has any
        nvidia = self.target[1].startswith("sm_")
        self.wide_precision = "tf32x3" if kind == tiles.MIXED and nvidia else self.precision

    @property
    def most_contexts(self):
        """U at most."""
        return min(self.sequences, self.table)

    @property
    def rows_each(self):
        """Rows of a context, on average and at least."""
        return self.tokens // max(self.most_contexts, 1)

    @cached_property
    def groups(self):
        block = tiles.tile("project", *self.target, self.rows_each, 1, 1).rows
        sizes = self.tokens, self.sequences, self.length, self.table
        return group_rows(*sizes, self.index, self.bounds, block, self.x.device)

    @cached_property
    def slot(self):
        """[N] int32, row of the context table of each row of x; None where they are the same."""
        if self.per_token or self.index is None and self.bounds is None and self.length == 1:
            return None
        sizes = self.tokens, self.sequences, self.length, self.table
        return slot_of_rows(*sizes, self.index, self.bounds, self.x.device)

    def buffer(self, size, dtype=None):
        return torch.empty(size, dtype=dtype or self.dtype, device=self.x.device)

    def device(self):
        """Launches go to the device of the tensors."""
        return torch.cuda.device(self.x.device) if self.x.is_cuda else nullcontext()

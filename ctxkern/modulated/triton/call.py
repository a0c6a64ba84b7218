"""What all launches of one call share: rows as a matrix, contexts, groups, precision."""

from functools import cached_property

import torch
import triton.language as tl

from ctxkern.dtypes import KERNEL_FLOATS, name_of
from ctxkern.modulated.operands import rounds_to_tf32
from ctxkern.modulated.plan import Problem
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.grouping import group_rows, slot_of_rows

TL_DTYPES = {dtype: getattr(tl, name_of(dtype)) for dtype in KERNEL_FLOATS}


class Call:
    """x [N, D], context [F, K]; sequences: B, length: rows of each, 0 where `cu_seqlens` has their bounds.

    operands: `ctxkern.modulated.operands.Operands` of `Operand`s. layout: what the call launches.
    """

    def __init__(self, operands, workspace_bytes, device, layout):
        x, context, weights, bilinears, _, self.index, self.bounds = operands
        self.x, self.context, self.layout = x.matrix(), context.matrix(), layout
        self.tokens, self.d_in = self.x.shape
        self.table, self.context_dim = self.context.shape
        self.per_token = len(context.shape) == 3
        if self.per_token:
            self.sequences, self.length = self.tokens, 1
        elif self.bounds is None:
            self.sequences, self.length = x.shape[:2]
        else:
            self.sequences, self.length = self.bounds.shape[0] - 1, 0
        self.budget, self.dtype, self.param_dtype = workspace_bytes, x.dtype, operands.param_dtype
        mixed = any(t is not None and t.dtype is not x.dtype for t in (context, *weights, *bilinears))
        kind = tiles.kind_of(x.dtype, mixed)
        # Triton knows of sizes whether 16 divides them, and of others what kernels say: what 16 bytes hold divides them
        sizes, unit = (self.d_in, *(t.shape[1] for t in bilinears)), 16 // x.dtype.itemsize
        aligned = all(size % unit == 0 for size in sizes)
        self.unit = unit if aligned and any(size % 16 for size in sizes) else 1
        self.target = kind, tiles.architecture(device), aligned
        # a float16 would lose small float32 parameters: their products are float32 (ctxkern.runtime.triton.device)
        self.compute = torch.float32 if kind == tiles.WIDE else x.dtype
        # of products in float32 next to halves: TF32's three, where the matrix unit has that
        split = kind in (tiles.MIXED, tiles.WIDE) and self.target[1].startswith("sm_")
        self.precision = "tf32x3" if split else "tf32" if rounds_to_tf32(x.dtype) else "ieee"

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
        block = tiles.tile("panel_y", *self.target, self.rows_each, 1, 1).rows
        return group_rows(self.layout, self._sequences, self.index, self.bounds, block)

    @cached_property
    def slot(self):
        """[N] int32, row of the context table of each row of x; None where they are the same."""
        if self.per_token or self.index is None and self.bounds is None and self.length == 1:
            return None
        return slot_of_rows(self.layout, self._sequences, self.index, self.bounds)

    @property
    def _sequences(self):
        return self.tokens, self.sequences, self.length, self.table

    @property
    def uniform(self):
        """Whether every context has `length` rows, in the order of the table, as shapes tell."""
        in_order = self.index is None and self.bounds is None and not self.per_token
        return in_order and self.sequences == self.table and self.tokens > 0

    def problem(self, d_out, has_weight=True):
        """The `Problem` of a projection."""
        sizes = self.tokens, self.most_contexts, self.d_in, d_out, self.context_dim
        return Problem(*sizes, self.dtype, self.param_dtype, "cuda", self.per_token, has_weight)

    @property
    def products(self):
        """How kernels multiply."""
        return {"DTYPE": TL_DTYPES[self.compute], "PRECISION": self.precision}

    def buffer(self, size, dtype=None, zeroed=False):
        return self.layout.buffer(size, dtype or self.dtype, zeroed)

    def launch(self, kernel, grid, **arguments):
        self.layout.launch(kernel, grid, arguments)

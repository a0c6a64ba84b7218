"""Fills the structs of problem.py from tensors; they keep none alive."""

from ctxkern.dtypes import CODES


def fill(operand, t):
    """Of a tensor without gaps."""
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]


def fill_matrix(operand, t):
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]
    operand.stride0, operand.stride1 = t.stride()


def fill_cube(operand, t):
    operand.data = t.data_ptr()
    operand.dtype = CODES[t.dtype]
    operand.stride0, operand.stride1, operand.stride2 = t.stride()


def fill_batch(batch, shape, table, index, bounds):
    """shape: of x; table: rows of the context or adapter table."""
    batch.table = table
    if bounds is None:
        batch.sequences, batch.length = shape[0], shape[1]
        batch.tokens = shape[0] * shape[1]
    else:
        batch.tokens, batch.sequences, batch.bounds = shape[0], bounds.shape[0] - 1, bounds.data_ptr()
    if index is not None:
        batch.index = index.data_ptr()

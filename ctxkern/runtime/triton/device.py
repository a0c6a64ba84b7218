"""What every kernel shares: products accumulated in float32, of operands of two dtypes; 64-bit offsets."""

import functools

import triton
import triton.language as tl

# a kernel; counts that no address depends on are not compiled for anew where they are 1 or a multiple of 16
kernel = functools.partial(
    triton.jit,
    do_not_specialize=("limit", "tiles", "length", "u_begin", "u_size", "first_strip", "programs", "splits", "spans"),
)


@triton.jit
def wide(i):
    """An integer, of a loop or an argument, that products with strides do not overflow."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def dot_rounded(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc with both rounded to DTYPE in registers."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def dot_wide(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc; of a float32 b beside a half, what rounding leaves is multiplied too: beside bfloat16, 16 bits."""
    rounded = b.to(a.dtype)
    acc = tl.dot(a, rounded, acc, input_precision=PRECISION)
    if a.dtype != b.dtype:
        acc = tl.dot(a, (b - rounded.to(b.dtype)).to(a.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_exact(a, b, acc, rest, PRECISION: tl.constexpr):
    """(acc, rest) with a @ b in their sum, with all 24 bits of a float32 b, for sums that nothing else rounds.

    What rounding b leaves is summed apart: matrix units cut off what does not fit beside a large sum.
    """
    rounded = b.to(a.dtype)
    acc = tl.dot(a, rounded, acc, input_precision=PRECISION)
    if a.dtype != b.dtype:
        left = b - rounded.to(b.dtype)
        rest = tl.dot(a, left.to(a.dtype), rest, input_precision=PRECISION)
        if a.dtype == tl.bfloat16:
            rest = tl.dot(a, (left - left.to(a.dtype).to(b.dtype)).to(a.dtype), rest, input_precision=PRECISION)
    return acc, rest

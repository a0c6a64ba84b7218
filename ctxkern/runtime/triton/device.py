"""What every kernel shares: products of operands of several dtypes, summed in float32; exact scales; 64-bit offsets.

DTYPE is the dtype that operands of a product are rounded to in registers. A float32 operand next to bfloat16 is split
into parts of that dtype. Next to float16, whose range it would leave, all become float32, which the matrix unit takes
as TF32: a float16 fits into it exactly.
"""

import functools

import triton
import triton.language as tl

# no address depends on them: kernels are not compiled again where they are 1 or a multiple of 16
_COUNTS = (
    "limit",
    "tiles",
    "length",
    "u_begin",
    "u_size",
    "first_strip",
    "programs",
    "splits",
    "spans",
    "kept_from",
)
kernel = functools.partial(triton.jit, do_not_specialize=_COUNTS)


@triton.jit
def wide(i):
    """An integer, of a loop or an argument, that products with strides do not overflow."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def whole(size, UNIT: tl.constexpr):
    """A size that UNIT divides, told to Triton, which by itself knows whether 16 does.

    It copies 16 bytes at a time where it knows their address to be a multiple of 16, as in rows of 1000 halves.
    """
    if UNIT > 1:
        size = size // UNIT * UNIT
    return size


@triton.jit
def dot_rounded(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc with both rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def dot_wide(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc with 16 bits of b or more; a fits into DTYPE."""
    rounded = b.to(DTYPE)
    acc = tl.dot(a.to(DTYPE), rounded, acc, input_precision=PRECISION)
    if b.dtype.primitive_bitwidth > rounded.dtype.primitive_bitwidth:
        acc = tl.dot(a.to(DTYPE), (b - rounded.to(tl.float32)).to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_exact(a, b, acc, rest, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(acc, rest) with a @ b in their sum, with all 24 bits of b, for sums that nothing else rounds; a fits into DTYPE.

    The residuals of b are summed apart: matrix units cut off what is small compared with a large sum.
    """
    rounded = b.to(DTYPE)
    acc = tl.dot(a.to(DTYPE), rounded, acc, input_precision=PRECISION)
    if b.dtype.primitive_bitwidth > rounded.dtype.primitive_bitwidth:
        left = b - rounded.to(tl.float32)
        rest = tl.dot(a.to(DTYPE), left.to(DTYPE), rest, input_precision=PRECISION)
        left -= left.to(DTYPE).to(tl.float32)
        rest = tl.dot(a.to(DTYPE), left.to(DTYPE), rest, input_precision=PRECISION)
    return acc, rest


@triton.jit
def scale_to_float16(largest):
    """(scale, 1 / scale), powers of two: what is at most `largest` is at most 2^15 when scaled, and as large as that
    allows, so that a float16 holds it without overflow and, but for the tiniest, with all its bits."""
    # exponents of float32 are biased by 127; products of two float16 that are not zero are 2^-48 or more
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 63)
    scale = ((2 * 127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return scale, inverse

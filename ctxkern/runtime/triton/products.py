"""In which dtype, and how exactly, the products of a call are made."""

import torch
import triton.language as tl

from ctxkern.dtypes import KERNEL_FLOATS, name_of
from ctxkern.plan import rounds_to_tf32

from .tiles import MIXED, WIDE

TL_DTYPES = {dtype: getattr(tl, name_of(dtype)) for dtype in KERNEL_FLOATS}


def products(dtype, kind, arch):
    """(dtype that operands are rounded to, precision of float32 products) of x in `dtype` with parameters of a kind."""
    # a float16 would lose small float32 parameters: their products are float32 (device.py)
    compute = torch.float32 if kind == WIDE else dtype
    # of products in float32 next to halves: TF32's three, where the matrix unit has that
    split = kind in (MIXED, WIDE) and arch.startswith("sm_")
    return compute, "tf32x3" if split else "tf32" if rounds_to_tf32(dtype) else "ieee"

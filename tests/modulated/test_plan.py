"""Which form the C++ kernels take, by `explain`."""

import pytest
import torch

import ctxkern
from ctxkern.runtime import cpu
from ctxkern.testing.force import force

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"the compiled core: {cpu.reason()}")

LINES, SHARED = 64, 24  # K whose rows of `bilinear` fill cache lines, and one whose rows share them


def planned(contexts, d, context_dim, dtype, backward):
    """The strategy for contexts of one row each."""
    shapes = (contexts, 1, d), (contexts, context_dim), (d, d), (d, d, context_dim)
    given = (torch.empty(shape, dtype=dtype) for shape in shapes)
    return ctxkern.explain(*given, backward=backward, backend="cpu").strategy


@pytest.mark.parametrize("isa", cpu.cpu_isas() or [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_outer_form_waits_for_contexts_that_pay(isa, dtype):
    with force(isa=isa):
        assert [planned(n, 512, LINES, dtype, True) for n in (2, 8, 32)] == ["panel", "outer", "outer"]
        assert [planned(n, 512, SHARED, dtype, True) for n in (8, 32)] == ["panel", "outer"]
        assert planned(2, 64, SHARED, dtype, True) == "outer"
        assert [planned(n, 512, LINES, dtype, False) for n in (32, 256)] == ["panel", "outer"]


@pytest.mark.parametrize("isa", cpu.cpu_isas() or [])
def test_weights_of_few_contexts_pay_at_small_sizes_with_avx512(isa):
    narrow = isa in ("scalar", "avx2")
    with force(isa=isa):
        assert planned(16, 128, 32, torch.float32, False) == ("outer" if narrow else "panel")

"""C++ kernels read nothing past the end of an operand: each ends where a page does, and the next page is unreadable."""

import pytest
from helpers.ends import survives

from ctxkern.runtime import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "available")

_CODE = """
import dataclasses, itertools, torch, ctxkern
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.force import force
from ctxkern.testing.oracle import run
from helpers.ends import at_the_end

names = "x", "context", "weight", "bilinear", "bias", "dy"
sizes = itertools.product((1, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64), (3, 8, 13), ((5, 33), (4, 32)))
for strategy, dtype, (context_dim, contexts, widths) in itertools.product(
    ("panel", "outer"), (torch.float32, torch.bfloat16), list(sizes)
):
    inputs = make_inputs(Case("ends", contexts, 3, *widths, context_dim, bias=True), dtype)
    ends = dataclasses.replace(inputs, **{{name: at_the_end(getattr(inputs, name)) for name in names}})
    with force(strategy=strategy, isa={isa!r}):
        first, second = (run(ctxkern.modulated_linear, each) for each in (inputs, ends))
    for name, value in first.items():
        assert torch.equal(value, second[name]), (strategy, dtype, context_dim, name)
"""


@pytest.mark.parametrize("isa", cpu.cpu_isas() or [])
def test_nothing_is_read_past_the_end_of_an_operand(isa):
    assert survives(_CODE.format(isa=isa)) is True

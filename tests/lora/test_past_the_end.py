"""C++ kernels read nothing past the end of an operand: each ends where a page does, and the next page is unreadable."""

import pytest
from helpers.ends import survives

from ctxkern.runtime import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "available")

# torch's product with the base may round otherwise where memory begins elsewhere; dA and dB have no part in it
_CODE = """
import itertools, torch, ctxkern
from ctxkern.testing.force import force
from helpers.ends import at_the_end

def gradients(x, weight, A, B, dy):
    A, B, x = (t.detach().requires_grad_() for t in (A, B, x))
    return torch.autograd.grad(ctxkern.lora_linear(x, weight, A, B), (A, B, x), dy)[:2]

sizes = itertools.product(((33, 47), (64, 32), (40, 16)), (1, 4, 7, 16, 17, 32, 33), (1, 5, 13))
for dtype, ((d_in, d_out), rank, rows) in itertools.product((torch.float32, torch.bfloat16), list(sizes)):
    shapes = (3, rows, d_in), (d_out, d_in), (3, rank, d_in), (3, d_out, rank), (3, rows, d_out)
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    with force(isa={isa!r}):
        first, second = gradients(*given), gradients(*map(at_the_end, given))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), (dtype, d_in, d_out, rank, rows)
"""


_GATES = """
import itertools, torch, ctxkern
from ctxkern.testing.force import force
from helpers.ends import at_the_end

def gradients(x, context, in_factor, context_factor, out_factor, dy, index):
    leaves = [t.detach().requires_grad_() for t in (context, context_factor)]
    y = ctxkern.factored_modulated_linear(x, leaves[0], None, in_factor, leaves[1], out_factor, context_index=index)
    return torch.autograd.grad(y, leaves, dy)

sizes = itertools.product((1, 15, 16, 33, 64), (1, 7, 16, 17, 33), (1, 5))
for dtype, (context_dim, rank, rows) in itertools.product((torch.float32, torch.bfloat16), list(sizes)):
    shapes = (3, rows, 32), (5, context_dim), (32, rank), (context_dim, rank), (rank, 16), (3, rows, 16)
    given = [*(torch.randn(shape).to(dtype) for shape in shapes), torch.tensor([4, 0, 4])]
    with force(isa={isa!r}):
        first, second = gradients(*given), gradients(*map(at_the_end, given))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), (dtype, context_dim, rank, rows)
"""


@pytest.mark.parametrize("code", [_CODE, _GATES], ids=["lora_linear", "gates"])
@pytest.mark.parametrize("isa", cpu.cpu_isas() or [])
def test_nothing_is_read_past_the_end_of_an_operand(code, isa):
    assert survives(code.format(isa=isa)) is True

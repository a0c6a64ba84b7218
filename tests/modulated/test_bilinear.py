"""ctxkern.bilinear and ctxkern.nn.Bilinear in the place of torch's: values, gradients, shapes, state, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import ctxkern
from ctxkern.nn import Bilinear
from ctxkern.testing.oracle import check_family

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# leading dimensions, in1, in2, out
SHAPES = [
    ((), 5, 8, 7),
    ((10,), 5, 8, 7),
    ((2, 3), 5, 9, 7),
    ((6,), 5, 9, 7),
    ((4, 6), 5, 9, 7),
    ((2, 3, 4), 3, 2, 1),
    ((1,), 1, 1, 1),
    ((2,), 4, 1, 3),
    ((33,), 17, 31, 13),
    ((0,), 5, 8, 7),
    ((2, 0, 3), 5, 8, 7),
    ((3,), 5, 8, 0),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(lead, in1, in2, out, dtype=torch.float32, bias=True, seed=0):
    """(arguments, gradient of the output)."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape, scale=1):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale**-0.5).to(dtype)

    arguments = {"input1": made(*lead, in1), "input2": made(*lead, in2), "weight": made(out, in1, in2, scale=in1 * in2)}
    return arguments | {"bias": made(out) if bias else None}, made(*lead, out)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_shape
def test_matches_torch(shape, dtype, bias):
    arguments, dout = problem(*shape, dtype, bias)
    check_family(ctxkern.bilinear, F.bilinear, arguments, dout)


LAYOUTS = {
    "input1-transposed": ("input1", lambda t: t.mT.contiguous().mT),
    "input2-strided": ("input2", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "input1-expanded": ("input1", lambda t: t[:1].expand_as(t)),
    "weight-permuted": ("weight", lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "weight-sliced": ("weight", lambda t: torch.cat((t, t), 2)[:, :, t.shape[2] :]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(name, layout, dtype):
    arguments, dout = problem((4, 6), 5, 9, 7, dtype)
    arguments[name] = layout(arguments[name])
    assert not arguments[name].is_contiguous()
    check_family(ctxkern.bilinear, F.bilinear, arguments, dout)


def test_float32_weights_beside_half_inputs():
    arguments, dout = problem((6,), 5, 9, 7)
    halves = {n: t.bfloat16() if n.startswith("input") else t for n, t in arguments.items()}

    def rounded(input1, input2, weight, bias):
        return F.bilinear(input1, input2, weight.to(input1.dtype), bias.to(input1.dtype))

    check_family(ctxkern.bilinear, rounded, halves, dout)


@pytest.mark.parametrize("lead", [(3,), (2, 2), ()], ids=str)
def test_derivatives(lead):
    arguments, _ = problem(lead, 3, 4, 2, torch.float64)
    leaves = [t.requires_grad_() for t in arguments.values()]
    assert gradcheck(ctxkern.bilinear, leaves)
    assert gradgradcheck(ctxkern.bilinear, leaves)


def test_an_empty_batch_has_zero_gradients():
    arguments, _ = problem((0,), 5, 8, 7)
    leaves = [t.requires_grad_() for t in arguments.values()]
    ctxkern.bilinear(*leaves).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in leaves)


class TestModule:
    @pytest.mark.parametrize("bias", [True, False])
    def test_same_start_under_a_seed(self, bias):
        layers = []
        for cls in (Bilinear, nn.Bilinear):
            torch.manual_seed(3)
            layers.append(cls(5, 8, 7, bias=bias))
        ours, theirs = layers
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert repr(ours) == repr(theirs)

    def test_state_dicts_go_both_ways(self):
        ours, theirs = Bilinear(5, 8, 7), nn.Bilinear(5, 8, 7)
        ours.load_state_dict(theirs.state_dict())
        inputs = torch.randn(4, 5), torch.randn(4, 8)
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))
        again = nn.Bilinear(5, 8, 7)
        again.load_state_dict(ours.state_dict())
        assert torch.equal(again(*inputs), theirs(*inputs))

    def test_trains_as_torchs_does(self):
        torch.manual_seed(0)
        theirs, ours = nn.Bilinear(5, 8, 7), Bilinear(5, 8, 7)
        ours.load_state_dict(theirs.state_dict())
        first, second, target = torch.randn(16, 5), torch.randn(16, 8), torch.randn(16, 7)
        for layer in (theirs, ours):
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                F.mse_loss(layer(first, second), target).backward()
                optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_dtype_and_device_arguments(self):
        layer = Bilinear(2, 3, 4, bias=False, device="meta", dtype=torch.bfloat16)
        assert (layer.weight.device.type, layer.weight.dtype, layer.bias) == ("meta", torch.bfloat16, None)
        assert layer(*(torch.empty(5, n, device="meta", dtype=torch.bfloat16) for n in (2, 3))).shape == (5, 4)


WRONG = {
    "in1": ((4, 6), (4, 8)),
    "in2": ((4, 5), (4, 9)),
    "batch": ((3, 5), (4, 8)),
    "leading-dimensions": ((2, 3, 5), (6, 8)),
    "broadcast": ((1, 5), (4, 8)),
    "one-without-batch": ((5,), (1, 8)),
}


@pytest.mark.parametrize("shapes", WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused(shapes):
    inputs = [torch.zeros(s) for s in shapes]
    with pytest.raises(RuntimeError):
        nn.Bilinear(5, 8, 7)(*inputs)
    with pytest.raises(ValueError, match="must be"):
        Bilinear(5, 8, 7)(*inputs)


def test_dtypes_that_torch_refuses_are_refused():
    inputs = torch.zeros(4, 5), torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        nn.Bilinear(5, 8, 7)(*inputs)
    with pytest.raises(TypeError, match="input2 is float64"):
        Bilinear(5, 8, 7)(*inputs)

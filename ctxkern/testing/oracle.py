"""The float64 oracle and the error budget.

A result passes where its error against the oracle is at most twice that of the plain einsum in the same dtypes, plus
the rounding band of the dtype: in the root mean square over the tensor, and at its worst element.
"""

import torch

from ctxkern.dtypes import FLOATS
from ctxkern.reference import modulated_linear_ref

# units in the last place of the tensor's root mean square (or largest) value that rounding alone may cost: in a float32
# sum that cancels, the order of its terms; next to float64 the oracle is itself rounded
BAND = {dtype: {2: 2.0, 4: 4.0, 8: 64.0}[dtype.itemsize] for dtype in FLOATS}


def run(fn, inputs):
    """{name: tensor}: the output y of fn(*arguments) and the gradient of every tensor argument, for `inputs.dy`."""
    leaves = inputs.leaves()
    positional, keyword = leaves.arguments()
    y = fn(*positional, **keyword)
    given = {n: t for n, t in zip(leaves.PARAMETERS, positional, strict=True) if t is not None}
    grads = torch.autograd.grad(y, tuple(given.values()), inputs.dy.to(y.dtype), allow_unused=True)
    results = {"y": y.detach()}
    for (name, t), grad in zip(given.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(t) if grad is None else grad
    return results


def oracle(inputs):
    """`run` of the reference in float64."""
    return run(modulated_linear_ref, inputs.map(lambda t: t.double()))


def baseline(inputs):
    """`run` of the einsum in the dtypes of the inputs."""
    return run(modulated_linear_ref, inputs)


def assert_matches(got, exact, plain, where=""):
    """Every tensor of `got` is finite and within the budget of `exact`, given `plain`: the einsum's in the same dtype.

    Raises AssertionError that names the tensor, its error and its budget.
    """
    assert got.keys() == exact.keys(), f"{where}: tensors {sorted(got)} for {sorted(exact)}"
    for name, value in got.items():
        message = f"{where} {name}".strip()
        want = exact[name]
        assert value.shape == want.shape, f"{message}: shape {list(value.shape)} for {list(want.shape)}"
        assert value.dtype == plain[name].dtype, f"{message}: {value.dtype} for {plain[name].dtype}"
        if value.numel() == 0:
            continue
        assert torch.isfinite(value).all(), f"{message}: not finite"
        band = BAND[value.dtype] * torch.finfo(value.dtype).eps
        for norm, size in (("rms", _rms), ("max", _max)):
            error, einsum = size(value.double() - want), size(plain[name].double() - want)
            budget = 2 * einsum + band * size(want)
            assert error <= budget, (
                f"{message}: {norm} error {error:.3g} over its budget {budget:.3g} (einsum {einsum:.3g}, {value.dtype})"
            )


def check(fn, inputs, where=""):
    """`fn` in place of `modulated_linear` gives the output and gradients of the oracle within the budget."""
    assert_matches(run(fn, inputs), oracle(inputs), baseline(inputs), where)


def differentiate(fn, tensors, dout):
    """{name: tensor}: the output y of fn(**tensors), or y0, y1, ... of several, and the gradient of every floating
    tensor for `dout`, one an output."""
    leaves = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in tensors.items()}
    given = {n: t for n, t in leaves.items() if is_floating(t)}
    outs = fn(**leaves)
    results = {"y": outs} if isinstance(outs, torch.Tensor) else {f"y{i}": y for i, y in enumerate(outs)}
    douts = [dout] if isinstance(outs, torch.Tensor) else dout
    douts = [d.to(y.dtype) for d, y in zip(douts, results.values(), strict=True)]
    grads = torch.autograd.grad(list(results.values()), list(given.values()), douts, materialize_grads=True)
    return {n: y.detach() for n, y in results.items()} | {f"d{n}": g for n, g in zip(given, grads, strict=True)}


def check_family(fn, reference, tensors, dout, where=""):
    """fn(**tensors) gives the outputs and gradients of `reference` in float64 within the budget."""
    double = {n: t.double() if is_floating(t) else t for n, t in tensors.items()}
    exact = differentiate(reference, double, dout)
    assert_matches(differentiate(fn, tensors, dout), exact, differentiate(reference, tensors, dout), where)


def is_floating(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _rms(t):
    return t.square().mean().sqrt().item()


def _max(t):
    return t.abs().max().item()


def assert_same_bits(first, second):
    """Two modules hold the same state, bit for bit."""
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name

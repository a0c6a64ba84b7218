"""Tensors that are not plain memory: every operand and every gradient as each kind of them, on every backend.

The result is that of the same values in a plain tensor, or a clear error; never a wrong number and never a signal.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ctxkern
from ctxkern.reference import lora_linear_ref, modulated_linear_ref, modulated_qkv_ref
from ctxkern.registry import resolve
from ctxkern.testing.cases import Case
from ctxkern.testing.families import (
    by_projection,
    factored_arguments,
    lora_arguments,
    modulated_arguments,
    qkv_arguments,
)
from ctxkern.testing.oracle import assert_matches

CASE = Case("small", 3, 4, 5, 6, 2, rows=2, index=(1, 0, 1), bias=True)
PACKED = Case("packed", 3, 0, 5, 6, 2, lengths=(2, 0, 3), bias=True)
PER_TOKEN = Case("per-token", 2, 3, 5, 6, 2, per_token=True, bias=True)


def negated(t):
    """Equal to t, with a lazy negation."""
    return torch._neg_view(-t)


def imaginary(t):
    """Equal to t: the imaginary part of a conjugate, strided and with a lazy negation."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def zero(t):
    """Zeros without memory."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


class Subclass(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapped(torch.Tensor):
    """A subclass with no memory, as DTensor and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, fn, types, args=(), kwargs=None):
        def unwrap(t):
            return t.inner if isinstance(t, cls) else t

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return fn(*args, **kwargs)


def inference(t):
    with torch.inference_mode():
        return t.clone()


KINDS = {
    "plain": lambda t: t,
    "negated": negated,
    "imaginary": imaginary,
    "zero": zero,
    "subclass": lambda t: t.as_subclass(Subclass),
    "wrapped": Wrapped,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "inference": inference,
    "expanded": lambda t: t[:1].expand(t.shape),
    "flipped-strides": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "shared": lambda t: t.clone().share_memory_(),
}

FAMILIES = {
    "modulated": (ctxkern.modulated_linear, modulated_linear_ref, lambda: modulated_arguments(CASE)),
    "modulated-packed": (ctxkern.modulated_linear, modulated_linear_ref, lambda: modulated_arguments(PACKED)),
    "modulated-per-token": (ctxkern.modulated_linear, modulated_linear_ref, lambda: modulated_arguments(PER_TOKEN)),
    "qkv": (by_projection(ctxkern.modulated_qkv), by_projection(modulated_qkv_ref), lambda: qkv_arguments(CASE)),
    "lora": (ctxkern.lora_linear, lora_linear_ref, lambda: lora_arguments(CASE, 3)),
    "factored": (
        ctxkern.factored_modulated_linear,
        ctxkern.reference.factored_modulated_linear_ref,
        lambda: factored_arguments(CASE, 3),
    ),
}
BACKENDS = [None, *(name for name, status in ctxkern.backends().items() if status and name != "reference")]


def takes(family, backend):
    try:
        resolve(backend, torch.device("cpu"), torch.float32, family.partition("-")[0])
    except RuntimeError:
        return False
    return True


PAIRS = [
    ("qkv", None),
    *((family, backend) for family in FAMILIES if family != "qkv" for backend in BACKENDS if takes(family, backend)),
]


def named(backend):
    return {} if backend is None else {"backend": backend}


def floats(arguments):
    return [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]


def as_tuple(outs):
    return (outs,) if isinstance(outs, torch.Tensor) else tuple(outs)


def plain(t):
    """The values in ordinary memory."""
    if isinstance(t, Wrapped):
        t = t.inner
    return (t.clone() if t._is_zerotensor() else t.resolve_neg()).as_subclass(torch.Tensor).clone()


def differentiated(fn, arguments, douts, dtype):
    """{name: tensor}: outputs y0, y1, ... and gradients of fn in a dtype, of the values in plain memory."""
    given = {n: plain(t).to(dtype) if n in floats(arguments) else t for n, t in arguments.items()}
    leaves = {n: given[n].requires_grad_() for n in floats(arguments)}
    outs = as_tuple(fn(**(given | leaves)))
    grads = torch.autograd.grad(outs, list(leaves.values()), [plain(d).to(dtype) for d in douts])
    made = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return made | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


class Budget:
    """What a family must give for arguments and gradients of its outputs: the float64 oracle and the einsum's error."""

    def __init__(self, ref, arguments, douts):
        self.exact, self.einsum = (differentiated(ref, arguments, douts, d) for d in (torch.float64, torch.float32))

    def check(self, got, where):
        """Some of the outputs (y0, ...) and gradients (dx, ...), each within its budget."""
        got = {name: plain(t) for name, t in got.items()}
        assert_matches(got, *({n: t for n, t in each.items() if n in got} for each in (self.exact, self.einsum)), where)


def named_outputs(outs):
    return {f"y{i}": y.detach() for i, y in enumerate(as_tuple(outs))}


def named_gradients(leaves, grads):
    return {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(("family", "backend"), PAIRS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_operands_of_any_kind_give_the_oracles_result(family, backend, data):
    fn, ref, make = FAMILIES[family]
    arguments, dout = make()
    names = floats(arguments)
    kinds = {n: data.draw(st.sampled_from(sorted(KINDS)), label=n) for n in names}
    arguments |= {n: KINDS[kinds[n]](arguments[n]) for n in names}
    budget = Budget(ref, arguments, as_tuple(dout))
    with torch.no_grad():
        budget.check(named_outputs(fn(**arguments, **named(backend))), f"{kinds}")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "parameter"])
@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_gradients_of_any_kind_give_the_oracles_result(family, kind, backend):
    fn, ref, make = FAMILIES[family]
    arguments, dout = make()
    douts = tuple(KINDS[kind](d) for d in as_tuple(dout))
    leaves = {n: arguments[n].clone().requires_grad_() for n in floats(arguments)}
    outs = as_tuple(fn(**(arguments | leaves), **named(backend)))
    got = torch.autograd.grad(outs, list(leaves.values()), douts)
    Budget(ref, arguments, douts).check(named_gradients(leaves, got), f"outputs' gradients {kind}")


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_gradients_are_those_of_one_at_a_time(family):
    fn, ref, make = FAMILIES[family]
    arguments, dout = make()
    leaves = {n: arguments[n].clone().requires_grad_() for n in floats(arguments)}
    outs = as_tuple(fn(**(arguments | leaves)))
    douts = [torch.stack((d, 2 * d, d * d)) for d in as_tuple(dout)]
    batched = torch.autograd.grad(outs, list(leaves.values()), douts, is_grads_batched=True, retain_graph=True)
    vmapped = torch.func.vmap(lambda *d: torch.autograd.grad(outs, list(leaves.values()), d, retain_graph=True))(*douts)
    for i in range(3):
        budget = Budget(ref, arguments, [d[i] for d in douts])
        budget.check(named_gradients(leaves, [g[i] for g in batched]), "is_grads_batched")
        budget.check(named_gradients(leaves, [g[i] for g in vmapped]), "vmap over autograd.grad")


@pytest.mark.parametrize("family", FAMILIES)
def test_tangents_of_the_outputs_gradients_reach_the_gradients(family):
    fn, ref, make = FAMILIES[family]
    arguments, dout = make()
    leaves = {n: arguments[n].clone().requires_grad_() for n in floats(arguments)}
    outs = as_tuple(fn(**(arguments | leaves)))
    douts = as_tuple(dout)
    tangents = [torch.randn_like(d) for d in douts]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(d, t) for d, t in zip(douts, tangents, strict=True)]
        got = torch.autograd.grad(outs, list(leaves.values()), duals, retain_graph=True)
        found = [forward_ad.unpack_dual(g).tangent for g in got]
    assert all(t is not None for t in found)
    Budget(ref, arguments, tangents).check(named_gradients(leaves, found), "tangents")


class Seen(TorchDispatchMode):
    """Counts the operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.namespace == "ctxkern":
            self.names.append(fn.name())
        return fn(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators():
    arguments, dout = modulated_arguments(CASE)
    arguments["x"].requires_grad_()
    with Seen() as seen:
        ctxkern.modulated_linear(**arguments).backward(dout)
    assert seen.names == ["ctxkern::modulated_forward", "ctxkern::modulated_backward"]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_workspaces_do_not_follow_a_default_device(device):
    case = Case("workspace", 8, 16, 256, 384, 32, bias=True)  # more than the megabyte that C++ takes for itself
    arguments, dout = modulated_arguments(case)
    lora, lora_dout = lora_arguments(CASE, 3)
    budget = Budget(modulated_linear_ref, arguments, [dout])
    torch.set_default_device(device)
    try:
        for backend in [name for name in BACKENDS if name != "triton"]:  # whose interpreter takes half a minute for it
            x = arguments["x"].clone().requires_grad_()
            y = ctxkern.modulated_linear(**(arguments | {"x": x}), backend=backend)
            y.backward(dout)
            assert (y.device.type, x.grad.device.type) == ("cpu", "cpu")
            budget.check({"y0": y.detach(), "dx": x.grad}, f"{backend}")
        assert ctxkern.lora_linear(**lora).device.type == "cpu"
        assert ctxkern.explain(**arguments).tokens == case.tokens
    finally:
        torch.set_default_device(None)


def test_a_functional_that_compiles_around_transforms_is_not_zero():
    arguments, _ = modulated_arguments(CASE)

    def loss(fn, dtype=torch.float32):
        given = {n: t.to(dtype) if n in floats(arguments) else t for n, t in arguments.items()}
        return lambda bilinear: fn(**(given | {"bilinear": bilinear})).square().sum()

    t, ours = arguments["bilinear"], loss(ctxkern.modulated_linear)
    exact, einsum = loss(modulated_linear_ref, torch.float64), loss(modulated_linear_ref)
    gradient = torch.compile(torch.func.grad(ours), fullgraph=True, backend="aot_eager")(t)
    tangent = torch.compile(lambda t: torch.func.jvp(ours, (t,), (t,))[1], fullgraph=True, backend="aot_eager")(t)
    wide = t.double()
    assert_matches(
        {"gradient": gradient, "tangent": tangent},
        {"gradient": torch.func.grad(exact)(wide), "tangent": torch.func.jvp(exact, (wide,), (wide,))[1]},
        {"gradient": torch.func.grad(einsum)(t), "tangent": torch.func.jvp(einsum, (t,), (t,))[1]},
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "modulated-packed"])
@pytest.mark.parametrize("grad", [False, True])
def test_traces_compute_and_hold_no_memory_of_their_run(family, grad):
    fn, ref, make = FAMILIES[family]
    arguments, dout = make()
    names = floats(arguments)

    def flat(*tensors):
        return fn(**(arguments | dict(zip(names, tensors, strict=True))))

    def tensors(scale):
        return tuple((scale * arguments[n]).detach().requires_grad_(grad) for n in names)

    traced = torch.jit.trace(flat, tensors(1.0), check_trace=False)
    others = arguments | dict(zip(names, tensors(0.5), strict=True))
    Budget(ref, others, as_tuple(dout)).check(named_outputs(traced(*tensors(0.5))), family)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    case = Case("flops", 4, 8, 16, 24, 3, bias=True)
    arguments, dout = modulated_arguments(case)
    arguments["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ctxkern.modulated_linear(**arguments).backward(dout)
    forward = 2 * 32 * 16 * 24 + 2 * 4 * 16 * 24 * 3
    assert counter.get_total_flops() == 3 * forward
    lora, lora_dout = lora_arguments(case, 2)
    with FlopCounterMode(display=False) as counter:
        ctxkern.lora_linear(**lora)
    assert counter.get_total_flops() == 2 * 32 * 2 * (16 + 24) + 2 * 32 * 16 * 24


def test_explain_and_calls_take_fake_tensors():
    from torch._subclasses import FakeTensorMode

    for case in (CASE, PACKED, PER_TOKEN):
        arguments, _ = modulated_arguments(case)
        with FakeTensorMode() as mode:
            arguments = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
            plan = ctxkern.explain(**arguments)
            y = ctxkern.modulated_linear(**arguments)
        assert plan.tokens == case.tokens
        assert y.shape[-1] == case.E


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    arguments, _ = modulated_arguments(CASE)
    assert torch.equal(
        ctxkern.modulated_linear(**arguments, workspace_bytes=np.int64(1 << 20)),
        ctxkern.modulated_linear(**arguments, workspace_bytes=1 << 20),
    )
    lora, _ = lora_arguments(CASE, 3)
    assert torch.equal(
        ctxkern.lora_linear(**(lora | {"scale": np.float32(0.5)})), ctxkern.lora_linear(**(lora | {"scale": 0.5}))
    )

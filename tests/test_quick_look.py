"""The quick look at arguments in C++: it passes no call that the checks in Python refuse."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ctxkern
from ctxkern import arguments
from ctxkern.runtime import cpu as cpu_runtime

B, S, D, E, K, R = 2, 3, 4, 6, 5, 2
pytestmark = pytest.mark.skipif(not ctxkern.backends()["cpu"], reason=str(ctxkern.backends()["cpu"]))


class Subclass(torch.Tensor):
    pass


def zeros(*shape):
    return torch.zeros(shape)


def longs(*values):
    return torch.tensor(values)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


X = [
    zeros(B, S, D),
    zeros(B, S, D).double(),
    zeros(B, S, D).half(),
    zeros(B, S, D).int(),
    zeros(7, D),
    zeros(B, S, D + 1),
    zeros(B, S, D).to_sparse(),
    torch.nested.nested_tensor([zeros(1, D), zeros(2, D)]),
    zeros(B, S, D).to("meta"),
    zeros(B, S, D).as_subclass(Subclass),
    1,
]
CONTEXT = [
    zeros(B, K),
    zeros(B, K).half(),
    zeros(B, K).int(),
    zeros(B + 1, K),
    zeros(B, K + 1),
    zeros(B, S, K),
    zeros(B, S + 1, K),
    zeros(K),
    None,
]
BIAS = [zeros(E), None, zeros(E + 1), zeros(1, E), zeros(E).double(), zeros(E).bool(), [0.0] * E]
INDEX = [longs(0, 1), None, longs(0), ints(0, 1), longs(0, 1).view(1, 2), longs(0, 1).to("meta"), [0, 1]]
BOUNDS = [None, ints(0, 3, 7), ints(0, 7), ints(), ints(0, 3, 7)[None], ints(0, 3, 7).to("meta"), longs(0, 3, 7)]


def weights(*shape):
    return [
        zeros(*shape),
        None,
        zeros(*shape).half(),
        zeros(*shape).double(),
        zeros(*shape).mT,
        zeros(*shape).to("meta"),
        0.5,
    ]


def of_three(*shape):
    first, second, third = shape
    others = (
        zeros(first, second + 1, third),
        zeros(second, first, third),
        zeros(first, second),
        zeros(first, second, third + 1),
    )
    return [zeros(*shape), zeros(*shape).bfloat16(), *others, zeros(first + 1, second, third), None]


# by function: of each argument what fits first, then what does not with it, or is not looked at
GIVEN = {
    "modulated_linear": (
        X,
        CONTEXT,
        weights(D, E),
        of_three(D, E, K),
        BIAS,
        INDEX,
        BOUNDS,
    ),
    "lora_linear": (
        X,
        [2.0, 1, True, "1", zeros(B), None],
        [0.0, 0, 0.5, -1.0, None],
        weights(E, D),
        of_three(B, R, D),
        of_three(B, E, R),
        BIAS,
        INDEX,
        BOUNDS,
        [longs(1, 2), None, longs(1), ints(1, 2), longs(1, 2).to("meta"), 1],
    ),
    "factored_modulated_linear": (
        X,
        CONTEXT,
        weights(D, E),
        weights(D, R),
        weights(K, R),
        weights(R, E),
        BIAS,
        INDEX,
        BOUNDS,
    ),
}


def lora_look(x, scale, dropout, *others):
    return arguments.fit_low_rank(scale, dropout, x, *others)


def modulated_linear(x, context, weight, bilinear, bias, context_index, cu_seqlens):
    arguments.activations("op", x, context)
    arguments.contexts("op", x, context, context_index, cu_seqlens)
    arguments.projection("op", x, context, weight, bilinear, bias)


def lora_linear(x, scale, dropout, weight, A, B, bias, adapter_index, cu_seqlens, ranks):
    given = (x, weight, A, B, scale, bias, adapter_index, cu_seqlens, ranks, dropout, None)
    arguments.low_rank("op", None, *given)


def factored_modulated_linear(*given):
    arguments.factored("op", *given)


CHECKS = {
    "modulated_linear": (arguments.fit, modulated_linear),
    "lora_linear": (lora_look, lora_linear),
    "factored_modulated_linear": (arguments.fit_factored, factored_modulated_linear),
}


def passes(check, given):
    try:
        check(*given)
    except (TypeError, ValueError):
        return False
    return True


def fitting(name, kind):
    """Arguments that fit each other, of padded or packed x, or with a context per token."""
    changed = {"padded": {}, "packed": {"X": zeros(7, D), "BOUNDS": ints(0, 3, 7)}}
    changed["per token"] = {"CONTEXT": zeros(B, S, K), "INDEX": None}
    lists = {"X": X, "CONTEXT": CONTEXT, "INDEX": INDEX, "BOUNDS": BOUNDS}
    by_list = {id(lists[what]): value for what, value in changed[kind].items()}
    return [by_list.get(id(values), values[0]) for values in GIVEN[name]]


def of_kind(name):
    return ("padded", "packed") if name == "lora_linear" else ("padded", "packed", "per token")


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in GIVEN for kind in of_kind(name)])
def test_it_passes_only_what_the_checks_pass(name, kind):
    values, (look, check) = GIVEN[name], CHECKS[name]
    fits = fitting(name, kind)
    assert look(*fits)
    quick = slow = 0
    for a, b in itertools.combinations(range(len(values)), 2):
        for first, second in itertools.product(values[a], values[b]):
            given = [*fits]
            given[a], given[b] = first, second
            if look(*given):
                assert passes(check, given), given
                quick += 1
            else:
                slow += passes(check, given)
    assert quick > (50 if kind == "padded" else 20)
    assert slow > 0


@pytest.mark.parametrize("name", GIVEN)
def test_it_passes_calls_without_an_index(name):
    look, fits = CHECKS[name][0], [each[0] for each in GIVEN[name]]
    at = next(i for i, values in enumerate(GIVEN[name]) if values is INDEX)
    fits[at] = None
    assert look(*fits)
    assert not look(*fits[:-1])


def dispatched():
    return TorchDispatchMode()


def differentiated():
    return forward_ad.dual_level()


def profiled():
    return torch.autograd.profiler.profile()


def cast():
    return torch.autocast("cpu")


@pytest.mark.parametrize("mode", [dispatched, differentiated, profiled, cast])
@pytest.mark.parametrize("name", GIVEN)
def test_it_passes_no_call_that_something_sees(name, mode):
    look, fits = CHECKS[name][0], [each[0] for each in GIVEN[name]]
    with mode():
        assert not look(*fits)
    assert look(*fits)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_it_passes_no_gradient_of_a_transform(transform):
    passed = []

    def of(dy):
        passed.append(ordinary_backward((dy,), ()))
        return dy.sum()

    ordinary_backward = cpu_runtime.load().ordinary_backward
    with torch.no_grad():
        assert ordinary_backward((zeros(E),), (zeros(E), None))
        assert not ordinary_backward((zeros(E),), (zeros(E).as_subclass(Subclass),))
        assert not ordinary_backward((torch._neg_view(zeros(E)),), ())
        transform(of)(zeros(E))
    assert not ordinary_backward((zeros(E),), ())
    assert passed == [False]


def test_it_passes_no_batched_gradient_of_an_outer_call():
    class Looked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            passed.append(cpu_runtime.load().ordinary_backward((dy,), ()))
            return dy * 1

    passed, x = [], zeros(E).requires_grad_()
    torch.autograd.grad(Looked.apply(x), x, torch.eye(E), is_grads_batched=True)
    torch.autograd.grad(Looked.apply(x), x, torch.ones(E))
    assert passed == [False, True]

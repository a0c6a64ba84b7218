"""PyTorch's machinery around the functions: autocast, checkpointing, copies, threads, deterministic mode, meta."""

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from helpers.kinds import PADDED, PER_TOKEN, RAGGED, SHARED
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ctxkern
from ctxkern.nn import Bilinear, ContextModulatedAttention, DynamicLoraLinear, ModulatedLinear
from ctxkern.testing.cases import make_inputs
from ctxkern.testing.families import by_projection, lora_arguments, modulated_arguments, qkv_arguments
from ctxkern.testing.oracle import assert_matches, baseline, differentiate, oracle, run

ops = torch.ops.ctxkern
by_kind = pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN], ids=lambda c: c.id)


class TestAutocast:
    """float32 tensors under autocast: the product in bfloat16, parameters and gradients in float32."""

    @by_kind
    def test_equals_explicit_casts(self, case):
        inputs = make_inputs(case)

        def automatic(x, *rest, **how):
            with torch.autocast("cpu", torch.bfloat16):
                return ctxkern.modulated_linear(x, *rest, **how)

        def explicit(x, *rest, **how):
            return ctxkern.modulated_linear(x.bfloat16(), *rest, **how)

        got, want = run(automatic, inputs), run(explicit, inputs)
        assert got["y"].dtype is torch.bfloat16
        assert all(t.dtype is torch.float32 for name, t in got.items() if name != "y")
        assert all(torch.equal(got[name], want[name]) for name in want)

    def test_backward_outside_and_inside(self):
        def gradients(inside):
            torch.manual_seed(0)
            layer = ContextModulatedAttention(8, 3, 2)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(torch.ones(2, 3, 8), torch.ones(2, 3))
                assert y.dtype is torch.bfloat16
                if inside:
                    y.square().sum().backward()
            if not inside:
                y.square().sum().backward()
            return [p.grad for p in layer.parameters()]

        for a, b in zip(gradients(True), gradients(False), strict=True):
            assert a.dtype is torch.float32
            assert torch.equal(a, b)

    @pytest.mark.parametrize("fn", ["lora_linear", "modulated_qkv"])
    def test_the_other_functions(self, fn):
        arguments = {
            "lora_linear": lambda: lora_arguments(SHARED, 2)[0],
            "modulated_qkv": lambda: qkv_arguments(SHARED)[0],
        }[fn]()
        call = getattr(ctxkern, fn)
        call = by_projection(call) if fn == "modulated_qkv" else call
        with torch.autocast("cpu", torch.bfloat16):
            outs = call(**arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert all(y.dtype is torch.bfloat16 for y in outs)

    def test_float64_stays(self):
        inputs = make_inputs(PADDED, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert ctxkern.modulated_linear(*inputs.arguments()[0]).dtype is torch.float64


def attention_and_inputs(seed=0):
    torch.manual_seed(seed)
    return ContextModulatedAttention(8, 3, 2, is_causal=True), torch.randn(4, 5, 8), torch.randn(4, 3)


def parameter_gradients(forward):
    layer, x, context = attention_and_inputs()
    leaf = x.requires_grad_()
    forward(layer, leaf, context.requires_grad_()).square().sum().backward()
    return [leaf.grad, context.grad, *(p.grad for p in layer.parameters())]


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_are_the_same_bits(self, use_reentrant):
        plain = parameter_gradients(lambda layer, *args: layer(*args))
        again = parameter_gradients(lambda layer, *args: checkpoint(layer, *args, use_reentrant=use_reentrant))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def test_a_selective_policy_sees_the_operator(self):
        seen = []

        def policy(ctx, op, *args, **kwargs):
            seen.append((op, ctx.is_recompute))
            ours = op is torch.ops.ctxkern.modulated_forward.default
            return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

        def selective(layer, *args):
            contexts = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)

        plain = parameter_gradients(lambda layer, *args: layer(*args))
        again = parameter_gradients(selective)
        assert (torch.ops.ctxkern.modulated_forward.default, False) in seen
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


MODULES = {
    "attention": (lambda: ContextModulatedAttention(8, 3, 2), ((2, 3, 8), (2, 3))),
    "linear": (lambda: ModulatedLinear(8, 4, 3), ((2, 3, 8), (2, 3))),
    "bilinear": (lambda: Bilinear(8, 3, 4), ((2, 8), (2, 3))),
    "lora": (lambda: DynamicLoraLinear(8, 4, alpha=2), ((2, 3, 8), (2, 2, 8), (2, 4, 2))),
}


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize(("make", "shapes"), MODULES.values(), ids=MODULES)
def test_copies_of_modules(make, shapes, again):
    module, args = make(), [torch.randn(s) for s in shapes]
    other = again(module)
    assert torch.equal(module(*args), other(*args))
    pointers = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (module, other))
    assert not set.intersection(*pointers)


def test_threads_do_not_disturb_each_other():
    problems = [make_inputs(case, seed=i) for i, case in enumerate([PADDED, SHARED, RAGGED, PER_TOKEN] * 2)]
    fn = partial(ctxkern.modulated_linear, workspace_bytes=256)
    alone = [run(fn, p) for p in problems]
    together = [None] * len(problems)

    def work(i):
        for _ in range(10):
            together[i] = run(fn, problems[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def deterministic_only():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_only")
@by_kind
def test_deterministic_algorithms_suffice(case):
    inputs = make_inputs(case)
    assert_matches(run(ctxkern.modulated_linear, inputs), oracle(inputs), baseline(inputs))
    if not case.per_token:
        differentiate(ctxkern.lora_linear, *lora_arguments(case, 2))


def test_meta_tensors_give_shapes():
    arguments, _ = modulated_arguments(SHARED)
    meta = {n: None if t is None else t.to("meta").requires_grad_(t.is_floating_point()) for n, t in arguments.items()}
    y = ctxkern.modulated_linear(**meta)
    assert (y.device.type, y.shape) == ("meta", (5, 4, 8))
    y.sum().backward()
    assert meta["bilinear"].grad.shape == (6, 8, 3)

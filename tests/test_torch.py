"""PyTorch's machinery over the operators: schemas, transforms, autocast, checkpointing, what is saved, same bits."""

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ctxkern
from ctxkern.nn import Bilinear, ContextModulatedAttention, DynamicLoraLinear, ModulatedLinear
from ctxkern.reference import modulated_linear_ref
from ctxkern.testing.cases import CASES, Case, make_inputs
from ctxkern.testing.families import by_projection, lora_arguments, modulated_arguments, qkv_arguments
from ctxkern.testing.oracle import assert_matches, baseline, differentiate, is_floating, oracle, run

ops = torch.ops.ctxkern
BY_ID = {case.id: case for case in CASES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHARED = Case("shared", 5, 4, 6, 8, 3, rows=4, index=(3, 0, 3, 1, 0), bias=True)
PADDED = Case("padded", 3, 5, 6, 8, 4, bias=True)
RAGGED = Case("ragged", 4, 0, 6, 8, 3, lengths=(3, 0, 5, 2), bias=True)
PER_TOKEN = Case("per-token", 2, 3, 6, 4, 3, per_token=True)
CHECKED = [
    *(BY_ID[name] for name in ("tiny", "no-weight", "shared-uneven", "ragged-shared", "ragged-empty-sequences")),
    *(BY_ID[name] for name in ("context-per-token", "permuted-bilinear", "expanded-bilinear")),
    *(BY_ID[name] for name in ("table-larger-than-batch", "empty-batch", "empty-context", "empty-packed")),
]
by_case = pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.id)
by_kind = pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN], ids=lambda c: c.id)


def modulated_operands(inputs, projections=1):
    """The arguments of the modulated operators but for `needs`."""
    lists = [[t] * projections for t in (inputs.weight, inputs.bilinear, inputs.bias)]
    options = (1 << 12, "portable")
    return (inputs.x, inputs.context, *lists, inputs.context_index, inputs.cu_seqlens, *options)


def needs_of(inputs, projections=1):
    return [
        True,
        True,
        *(t is not None for t in (inputs.weight, inputs.bilinear, inputs.bias) for _ in range(projections)),
    ]


@by_case
def test_modulated_operators(case):
    inputs = make_inputs(case)
    opcheck(ops.modulated_forward.default, modulated_operands(inputs))
    opcheck(ops.modulated_backward.default, ([inputs.dy], *modulated_operands(inputs), needs_of(inputs)))


@by_kind
def test_modulated_operators_in_bfloat16_with_float32_parameters(case):
    inputs = make_inputs(case, torch.bfloat16, torch.float32)
    opcheck(ops.modulated_forward.default, modulated_operands(inputs))
    opcheck(ops.modulated_backward.default, ([inputs.dy], *modulated_operands(inputs), needs_of(inputs)))


def test_modulated_operators_with_three_projections():
    inputs = make_inputs(SHARED)
    opcheck(ops.modulated_forward.default, modulated_operands(inputs, 3))
    opcheck(ops.modulated_backward.default, ([inputs.dy] * 3, *modulated_operands(inputs, 3), needs_of(inputs, 3)))


@pytest.mark.parametrize("needed", range(5))
def test_modulated_backward_of_one_gradient(needed):
    inputs = make_inputs(PADDED)
    opcheck(ops.modulated_backward.default, ([inputs.dy], *modulated_operands(inputs), [i == needed for i in range(5)]))


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("case", [PADDED, PER_TOKEN, SHARED], ids=lambda c: c.id)
def test_modulated_operators_with_permuted_x(case, order):
    inputs = make_inputs(case)
    inverse = [order.index(i) for i in range(3)]
    inputs.x = inputs.x.permute(order).contiguous().permute(inverse)
    inputs.dy = inputs.dy.permute(order).contiguous().permute(inverse)
    opcheck(ops.modulated_forward.default, modulated_operands(inputs))
    opcheck(ops.modulated_backward.default, ([inputs.dy], *modulated_operands(inputs), needs_of(inputs)))


@pytest.mark.parametrize("case", [c for c in CHECKED if not c.per_token], ids=lambda c: c.id)
def test_lora_operators(case):
    arguments, dout = lora_arguments(case, 3)
    names = ("x", "weight", "A", "B", "bias", "adapter_index", "cu_seqlens", "scale")
    operands = (*(arguments[n] for n in names), 1 << 12, "portable")
    needs = [arguments[n] is not None for n in names[:5]]
    opcheck(ops.lora_forward.default, operands)
    opcheck(ops.lora_backward.default, (dout, *operands, needs))


def loss_of(case, dtype=torch.float64):
    """A function of the floating tensors of a case and their values."""
    arguments, dout = modulated_arguments(case, dtype)
    names = [n for n, t in arguments.items() if is_floating(t)]

    def outputs(fn, *tensors):
        return fn(**(arguments | dict(zip(names, tensors, strict=True))))

    return outputs, [arguments[n] for n in names], dout


@by_kind
def test_func_grad_jacrev_and_jvp(case):
    outputs, tensors, dout = loss_of(case)
    argnums = tuple(range(len(tensors)))

    def weighted(fn, *tensors):
        return (outputs(fn, *tensors) * dout).sum()

    for transform in (partial(torch.func.grad, argnums=argnums), partial(torch.func.jacrev, argnums=argnums)):
        got = transform(partial(weighted, ctxkern.modulated_linear))(*tensors)
        torch.testing.assert_close(got, transform(partial(weighted, modulated_linear_ref))(*tensors))
    tangents = tuple(torch.ones_like(t) for t in tensors)
    got = torch.func.jvp(partial(outputs, ctxkern.modulated_linear), tuple(tensors), tangents)
    torch.testing.assert_close(got, torch.func.jvp(partial(outputs, modulated_linear_ref), tuple(tensors), tangents))


def test_vmap_over_each_argument():
    arguments, _ = modulated_arguments(PADDED, torch.float64)
    for name, t in arguments.items():
        if not is_floating(t):
            continue
        stack = torch.stack([t, t.flip(-1), 2 * t])

        def one(t, name=name):
            return ctxkern.modulated_linear(**(arguments | {name: t}))

        torch.testing.assert_close(torch.func.vmap(one)(stack), torch.stack([one(t) for t in stack]))


def test_vmap_of_grad_gives_a_gradient_a_sample():
    arguments, _ = modulated_arguments(PADDED, torch.float64)

    def loss(bilinear, x, context):
        call = arguments | {"x": x[None], "context": context[None], "bilinear": bilinear}
        return ctxkern.modulated_linear(**call).square().sum()

    x, context, bilinear = (arguments[n] for n in ("x", "context", "bilinear"))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(bilinear, x, context)
    one_by_one = [torch.func.grad(loss)(bilinear, x[b], context[b]) for b in range(PADDED.B)]
    torch.testing.assert_close(each, torch.stack(one_by_one))


@by_kind
def test_forward_mode(case):
    outputs, tensors, _ = loss_of(case)
    leaves = [t.requires_grad_() for t in tensors]
    fn = partial(outputs, ctxkern.modulated_linear)
    torch.autograd.gradcheck(fn, leaves, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)


@by_kind
def test_double_backward_is_that_of_the_reference(case):
    def penalty(fn):
        arguments, dout = modulated_arguments(case, torch.float64)
        leaves = {n: t.requires_grad_() if is_floating(t) else t for n, t in arguments.items()}
        given = [t for t in leaves.values() if is_floating(t)]
        first = torch.autograd.grad(fn(**leaves), given, dout.requires_grad_(), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [*first, dout.grad, *(torch.zeros_like(t) if t.grad is None else t.grad for t in given)]

    torch.testing.assert_close(penalty(ctxkern.modulated_linear), penalty(modulated_linear_ref))


def test_the_same_tensor_given_twice():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bilinear = torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True)

    def fn(x, bilinear):
        return ctxkern.modulated_linear(x, x, bilinear[0], bilinear)

    assert torch.autograd.gradcheck(fn, (x, bilinear))
    assert torch.autograd.gradgradcheck(fn, (x, bilinear))


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

    @pytest.mark.parametrize("fn", ["lora_linear", "modulated_qkv", "bilinear"])
    def test_the_other_functions(self, fn):
        arguments = {
            "lora_linear": lambda: lora_arguments(SHARED, 2)[0],
            "modulated_qkv": lambda: qkv_arguments(SHARED)[0],
            "bilinear": lambda: {n: torch.randn(s) for n, s in (("input1", 4), ("input2", 5), ("weight", (6, 4, 5)))},
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


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=["f32", "bf16-f32"])
@pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN, BY_ID["permuted-bilinear"]], ids=lambda c: c.id)
def test_saves_its_inputs_only(case, dtypes):
    arguments, _ = modulated_arguments(case, *dtypes)
    leaves = {n: t.requires_grad_() if is_floating(t) else t for n, t in arguments.items()}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ctxkern.modulated_linear(**leaves)
    assert saved
    given = [t for t in leaves.values() if t is not None]
    assert all(any(s.data_ptr() == t.data_ptr() and s.shape == t.shape for t in given) for s in saved)


def test_lora_and_qkv_save_their_inputs_only():
    for fn, (arguments, _) in (
        (ctxkern.lora_linear, lora_arguments(SHARED, 2)),
        (by_projection(ctxkern.modulated_qkv), qkv_arguments(RAGGED)),
    ):
        leaves = {n: t.requires_grad_() if is_floating(t) else t for n, t in arguments.items()}
        saved = []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            fn(**leaves)
        assert storages(saved) <= storages(t for t in leaves.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [1 << 12, None])
@pytest.mark.parametrize("name", ["shared-uneven", "ragged-shared", "context-per-token"])
def test_same_inputs_same_bits(name, dtype, workspace):
    inputs = make_inputs(BY_ID[name], dtype)
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    first = run(fn, inputs)
    for _ in range(3):
        # other memory, other addresses
        again = run(fn, inputs.map(lambda t: t.clone(memory_format=torch.preserve_format)))
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED], ids=lambda c: c.id)
def test_lora_same_inputs_same_bits(case):
    arguments, dout = lora_arguments(case, 3)
    first, again = (differentiate(ctxkern.lora_linear, arguments, dout) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN, BY_ID["expanded-x"]], ids=lambda c: c.id)
def test_backward_writes_into_nothing_it_was_given(case):
    arguments, dout = modulated_arguments(case)
    before = {n: t.clone() for n, t in arguments.items() if t is not None} | {"dout": dout.clone()}
    versions = {n: t._version for n, t in (arguments | {"dout": dout}).items() if t is not None}
    differentiate(ctxkern.modulated_linear, arguments, dout)
    for name, t in (arguments | {"dout": dout}).items():
        if t is not None:
            assert torch.equal(t, before[name])
            assert t._version == versions[name]


LAYOUTS = {
    "permuted": lambda dy: dy.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda dy: dy.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda dy: dy.flatten(0, -2)[0].expand(dy.shape),
    "a-single-number": lambda dy: dy.flatten()[0].expand(dy.shape),
}


@by_kind
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_dout(case, layout):
    inputs = make_inputs(case)
    inputs.dy = layout(inputs.dy)
    assert not inputs.dy.is_contiguous()
    assert_matches(run(ctxkern.modulated_linear, inputs), oracle(inputs), baseline(inputs))


@pytest.mark.parametrize("needed", ["x", "context", "weight", "bilinear", "bias"])
@pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, BY_ID["context-per-token"]], ids=lambda c: c.id)
def test_one_gradient_alone(case, needed):
    inputs = make_inputs(case)
    arguments, dout = modulated_arguments(case)
    every = run(ctxkern.modulated_linear, inputs)
    arguments[needed].requires_grad_()
    y = ctxkern.modulated_linear(**arguments)
    (alone,) = torch.autograd.grad(y, arguments[needed], dout)
    exact, plain = oracle(inputs), baseline(inputs)
    name = f"d{needed}"
    assert_matches({name: alone}, {name: exact[name]}, {name: plain[name]})
    assert torch.equal(alone, every[name])


def test_no_graph_where_nothing_needs_a_gradient():
    arguments, _ = modulated_arguments(PADDED)
    assert ctxkern.modulated_linear(**arguments).grad_fn is None
    arguments["x"].requires_grad_()
    with torch.no_grad():
        assert not ctxkern.modulated_linear(**arguments).requires_grad
    with torch.inference_mode():
        assert ctxkern.modulated_linear(**arguments).is_inference()


def test_only_one_output_of_qkv_is_used():
    arguments, douts = qkv_arguments(SHARED, torch.float64)
    leaves = {n: t.requires_grad_() if is_floating(t) else t for n, t in arguments.items()}
    q, k, v = by_projection(ctxkern.modulated_qkv)(**leaves)
    k.backward(douts[1])
    single = {n: leaves[n].detach() for n in ("x", "context", "context_index", "cu_seqlens") if leaves[n] is not None}
    single |= {n: leaves[f"{n}1"].detach() for n in ("weight", "bilinear", "bias")}
    want = differentiate(ctxkern.modulated_linear, single, douts[1])
    torch.testing.assert_close(leaves["x"].grad, want["dx"])
    torch.testing.assert_close(leaves["context"].grad, want["dcontext"])
    torch.testing.assert_close(leaves["bilinear1"].grad, want["dbilinear"])
    assert not leaves["bilinear0"].grad.any()


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
    assert not storages(module.parameters()) & storages(other.parameters())


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

"""What autograd keeps, writes and repeats: inputs saved only, same bits, any layout, any subset of gradients."""

from functools import partial

import pytest
import torch
from helpers.kinds import BY_ID, DTYPES, PADDED, PER_TOKEN, RAGGED, SHARED
from torch.autograd.graph import saved_tensors_hooks

import ctxkern
from ctxkern.testing.cases import make_inputs
from ctxkern.testing.families import by_projection, lora_arguments, modulated_arguments, qkv_arguments
from ctxkern.testing.oracle import assert_matches, baseline, differentiate, is_floating, oracle, run

by_kind = pytest.mark.parametrize("case", [PADDED, SHARED, RAGGED, PER_TOKEN], ids=lambda c: c.id)


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

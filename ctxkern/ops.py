"""The operators as torch.library knows them: schema, fake and autograd; the maths is in the folders of the families.

A gradient is an operator too, so that compilers and selective checkpointing see both. Of torch.library's routes this
one (define, impl, a thin autograd.Function outside, left out where no gradient is needed) costs least per call.

Kernels read raw pointers, so they are called with plain tensors alone: strided, on a CPU or GPU, with no negative or
conjugate bit, not zero tensors, not batched, traced or fake, and of no subclass. Everything else goes through the
dispatcher, which resolves it or tells a mode, a compiler, a tracer or the profiler. Double backward, forward-mode
differentiation and torch.func take the reference, also where they are entered between the forward and the backward.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._C import _dispatch_keys
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.library import Library

from . import reference
from .checks import autocast_enabled
from .lora import operands as lora_operands
from .modulated import operands as modulated_operands
from .registry import implementation

_library = Library("ctxkern", "DEF")


class Options(NamedTuple):
    """Of a call, what is no tensor. backend: the caller's choice, None for the best one."""

    workspace_bytes: int
    backend: str | None
    scale: float = 1.0


def _operator(schema, fake):
    """Decorator: the function becomes the one kernel, for every device, of the operator with this schema."""
    name = schema.split("(")[0]

    def register(fn):
        def kernel(*args):
            t = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            if autocast_enabled(t):
                with torch.autocast(t.device.type, enabled=False), torch.no_grad():
                    return fn(*args)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return fn(*args)
            return fn(*args)

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ctxkern::{name}", fake, lib=_library)
        return _Operator(kernel, getattr(torch.ops.ctxkern, name).default)

    return register


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
# raw dispatch key sets of plain tensors and of others, as they are met
_PLAIN_KEYS: dict[int, bool] = {}


def is_plain(t):
    """Whether kernels may read the memory of a tensor through its pointer."""
    if type(t) not in _PLAIN_TYPES:
        return False
    keys = _dispatch_keys(t).raw_repr()
    plain = _PLAIN_KEYS.get(keys)
    if plain is None:
        plain = _PLAIN_KEYS[keys] = keys in _plain_keys(t.device.type)
    return plain


@cache
def _plain_keys(device_type):
    """The key sets of ordinary tensors of a device, made in and outside of inference mode."""
    if device_type not in ("cpu", "cuda"):
        return frozenset()
    made = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            made.append(_dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(made)


class _Operator(NamedTuple):
    kernel: Callable
    dispatched: Callable

    def over(self, *flat):
        """The kernel itself where all tensors are plain and nothing else must see the call; else the dispatcher's.

        Passing the dispatcher by saves 13 of 75 µs at B=4, S=32, d=64, K=16."""
        if torch.compiler.is_compiling():
            return self.dispatched
        for tensors in flat:
            for t in tensors:
                if t is not None and not is_plain(t):
                    return self.dispatched
        if torch._C._len_torch_dispatch_stack() or _profiler_enabled() or torch._C._get_tracing_state():
            return self.dispatched
        return self.kernel


def _like(t):
    """The layout of the gradient of a parameter: its own where that is dense."""
    return torch.empty_like(t)


def _contiguous(t):
    return t.new_empty(t.shape)


def _needed(flat, needs):
    return [t for t, need in zip(flat, needs, strict=True) if need]


def _spread(grads, needs):
    """The opposite of `_needed`: None where no gradient was asked for."""
    if len(grads) == len(needs):
        return grads
    grads = iter(grads)
    return [next(grads) if need else None for need in needs]


def _modulated_fake(x, context, weights, bilinears, *_):
    return [x.new_empty((*x.shape[:-1], t.shape[1])) for t in bilinears]


@_operator(
    "modulated_forward(Tensor x, Tensor context, Tensor?[] weights, Tensor[] bilinears, Tensor?[] biases, "
    "Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str? backend) -> Tensor[]",
    _modulated_fake,
)
def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend):
    """y of each projection."""
    operands = modulated_operands.Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    return implementation("modulated", backend, x).forward(operands, workspace_bytes)


def _modulated_backward_fake(douts, x, context, weights, bilinears, biases, _index, _cu, _workspace, _backend, needs):
    layouts = [_contiguous] * 2 + [_like] * (2 * len(bilinears)) + [_contiguous] * len(biases)
    inputs = (x, context, *weights, *bilinears, *biases)
    return [layout(t) for layout, t, need in zip(layouts, inputs, needs, strict=True) if need]


@_operator(
    "modulated_backward(Tensor[] douts, Tensor x, Tensor context, Tensor?[] weights, Tensor[] bilinears, "
    "Tensor?[] biases, Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str? backend, bool[] needs) "
    "-> Tensor[]",
    _modulated_backward_fake,
)
def modulated_backward(
    douts, x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend, needs
):
    """The gradients that `needs` asks for, of (x, context, *weights, *bilinears, *biases) in this order."""
    operands = modulated_operands.Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    needed = modulated_operands.Gradients.of(needs)
    grads = implementation("modulated", backend, x).backward(douts, operands, workspace_bytes, needed)
    dbiases = [g if g is None else g.to(b.dtype) for g, b in zip(grads.biases, biases, strict=True)]
    return _needed(grads._replace(biases=dbiases).flat(), needs)


def _lora_fake(x, weight, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[1]))


@_operator(
    "lora_forward(Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str? backend) -> Tensor",
    _lora_fake,
)
def lora_forward(x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend):
    """y of a linear layer with an adapter per sequence."""
    operands = lora_operands.Operands(x, weight, A, B, bias, adapter_index, cu_seqlens)
    return implementation("lora", backend, x).forward(operands, scale, workspace_bytes)


def _lora_backward_fake(dout, x, weight, A, B, bias, _index, _cu, _scale, _workspace, _backend, needs):
    layouts = (_contiguous, _like, _contiguous, _contiguous, _contiguous)
    return [layout(t) for layout, t, need in zip(layouts, (x, weight, A, B, bias), needs, strict=True) if need]


@_operator(
    "lora_backward(Tensor dout, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str? backend, bool[] needs) -> Tensor[]",
    _lora_backward_fake,
)
def lora_backward(dout, x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend, needs):
    """The gradients that `needs` asks for, of (x, weight, A, B, bias) in this order."""
    operands = lora_operands.Operands(x, weight, A, B, bias, adapter_index, cu_seqlens)
    needed = lora_operands.Gradients.of(needs)
    grads = implementation("lora", backend, x).backward(dout, operands, scale, workspace_bytes, needed)
    dbias = grads.bias if grads.bias is None else grads.bias.to(bias.dtype)
    return _needed(grads._replace(bias=dbias).flat(), needs)


class Family(NamedTuple):
    """How autograd calls the operators of a family. All take `Operands` and `Options` and give a tuple of outputs."""

    operands: Any
    forward: Callable
    backward: Callable  # (douts, operands, options, needs) → the needed gradients
    reference: Callable


def _run_modulated(operands, options):
    run = modulated_forward.over(operands.flat())
    return tuple(run(*operands, options.workspace_bytes, options.backend))


def _run_modulated_backward(douts, operands, options, needs):
    run = modulated_backward.over(operands.flat(), douts)
    return run(list(douts), *operands, options.workspace_bytes, options.backend, needs)


def _modulated_reference(operands, _options):
    x, context, weights, bilinears, biases, context_index, cu_seqlens = operands
    return tuple(
        reference.modulated_linear_ref(x, context, w, t, b, context_index=context_index, cu_seqlens=cu_seqlens)
        for w, t, b in zip(weights, bilinears, biases, strict=True)
    )


def _run_lora(operands, options):
    run = lora_forward.over(operands.flat())
    return (run(*operands, options.scale, options.workspace_bytes, options.backend),)


def _run_lora_backward(douts, operands, options, needs):
    run = lora_backward.over(operands.flat(), douts)
    return run(douts[0], *operands, options.scale, options.workspace_bytes, options.backend, needs)


def _lora_reference(operands, options):
    x, weight, A, B, bias, adapter_index, cu_seqlens = operands
    spans = {"adapter_index": adapter_index, "cu_seqlens": cu_seqlens}
    return (reference.lora_linear_ref(x, weight, A, B, options.scale, bias, **spans),)


MODULATED = Family(modulated_operands.Operands, _run_modulated, _run_modulated_backward, _modulated_reference)
LORA = Family(lora_operands.Operands, _run_lora, _run_lora_backward, _lora_reference)
# index and bounds, which end every family's operands and have no gradient
_SPANS = 2


def _differentiable(family):
    """The operators of a family as one autograd.Function of (options, *operands.flat())."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, options, *flat):
            ctx.options = options
            ctx.save_for_backward(*flat)
            return family.forward(family.operands.of(flat), options)

        @staticmethod
        def backward(ctx, *douts):
            flat, needs = ctx.saved_tensors, list(ctx.needs_input_grad[1:-_SPANS])
            if not torch.compiler.is_compiling():
                if transformed() or any(is_transformed(t) for t in douts):
                    grads = _vjp(family, flat, ctx.options, needs, douts)
                    return None, *_spread(grads, needs), None, None
                if torch.is_grad_enabled():
                    grads = Backward.apply(ctx.options, needs, len(douts), *douts, *flat)
                    return None, *_spread(grads, needs), None, None
            grads = family.backward(douts, family.operands.of(flat), ctx.options, needs)
            return None, *_spread(grads, needs), None, None

    class Backward(torch.autograd.Function):
        """The gradient as a differentiable function; its own gradient is that of the reference's."""

        @staticmethod
        def forward(ctx, options, needs, n, *tensors):
            ctx.options, ctx.needs, ctx.n = options, needs, n
            ctx.save_for_backward(*tensors)
            return tuple(family.backward(tensors[:n], family.operands.of(tensors[n:]), options, needs))

        @staticmethod
        def backward(ctx, *seconds):
            asked = ctx.needs_input_grad[3:-_SPANS]
            tensors = _views(ctx.saved_tensors)
            douts, flat = tensors[: ctx.n], tensors[ctx.n :]
            with torch.enable_grad():
                firsts = _vjp(family, flat, ctx.options, ctx.needs, douts, views=False)
                seconds = [s.to(f.dtype) for s, f in zip(seconds, firsts, strict=True)]
                grads = _grad(firsts, _needed(tensors[:-_SPANS], asked), seconds)
            return None, None, None, *_spread(grads, asked), None, None

    return Forward


def _views(tensors):
    """Views, so that a tensor given twice counts as two inputs; detached where no further derivative is asked for."""
    again = torch.is_grad_enabled()

    def view(t):
        if t is None or not t.is_floating_point():
            return t
        return (t if again else t.detach().requires_grad_()).view_as(t)

    with torch.enable_grad():
        return [view(t) for t in tensors]


def _vjp(family, flat, options, needs, douts, views=True):
    """The gradients that `needs` asks for, of the reference; differentiable where gradients are enabled."""
    flat = _views(flat) if views else flat
    with torch.enable_grad():
        outs = family.reference(family.operands.of(flat), options)
    return _grad(outs, _needed(flat[:-_SPANS], needs), douts)


def _grad(outs, inputs, douts):
    """torch.autograd.grad that stays differentiable and gives zeros where outs do not depend on an input."""
    pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    outs, douts = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    return torch.autograd.grad(outs, inputs, douts, create_graph=again, materialize_grads=True)


def transformed():
    """Whether torch.func or forward-mode differentiation is under way; known to a compiler too."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_transformed(t):
    """Whether a tensor is batched or wrapped by a transform, that of an outer call included."""
    keys = _dispatch_keys(t)
    return any(keys.has(key) for key in _TRANSFORMS)


_TRANSFORMS = (
    torch._C.DispatchKey.FuncTorchBatched,
    torch._C.DispatchKey.FuncTorchGradWrapper,
    torch._C._dispatch_key_parse("Batched"),
)


def readable(t):
    """The tensor under the wrappers of torch.func, None where it is one of a vmap."""
    functorch = torch._C._functorch
    while t is not None and functorch.is_functorch_wrapped_tensor(t):
        t = None if functorch.is_batchedtensor(t) else functorch.get_unwrapped(t)
    return t


def _call(family, function, operands, options):
    if options.backend == "reference" or transformed():
        return family.reference(operands, options)
    if torch.is_grad_enabled():
        flat = operands.flat()
        for t in flat:
            if t is not None and t.requires_grad:
                return function.apply(options, *flat)
    return family.forward(operands, options)


_modulated_function, _lora_function = _differentiable(MODULATED), _differentiable(LORA)


def modulated(operands, workspace_bytes, backend):
    """A tuple of outputs, one per projection."""
    return _call(MODULATED, _modulated_function, operands, Options(workspace_bytes, backend))


def lora(operands, scale, workspace_bytes, backend):
    """The output of a linear layer with an adapter per sequence."""
    return _call(LORA, _lora_function, operands, Options(workspace_bytes, backend, scale))[0]

"""The operators as torch.library knows them: schema, fake and autograd; the maths is in the backends.

A gradient is an operator too, so that compilers and selective checkpointing see both. Double backward, forward-mode and
torch.func go through the reference. Of torch.library's routes this one (define, impl, a thin autograd.Function outside,
left out where no gradient is needed) costs least a call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._C._autograd import _profiler_enabled
from torch.library import Library

from . import reference
from .checks import autocast_enabled
from .registry import implementation

_library = Library("ctxkern", "DEF")


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


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Operator(NamedTuple):
    kernel: Callable
    dispatched: Callable

    def over(self, tensors):
        """The kernel itself, unless anyone else must see the call: a compiler, a mode, a tensor subclass, the profiler.
        Passing the dispatcher by saves 13 of 75 µs at B=4, S=32, d=64, K=16."""
        for t in tensors:
            if t is not None and type(t) not in _PLAIN:
                return self.dispatched
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _profiler_enabled():
            return self.dispatched
        return self.kernel


def _like(t):
    """The layout of the gradient of a parameter: its own where that is dense."""
    return torch.empty_like(t)


def _contiguous(t):
    return t.new_empty(t.shape)


def _needed(grads, needs):
    return [g for g, need in zip(grads, needs, strict=True) if need]


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
    "Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str backend) -> Tensor[]",
    _modulated_fake,
)
def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend):
    """y of each projection."""
    return implementation(backend, x, "modulated").modulated_forward(
        x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes
    )


def _modulated_backward_fake(douts, x, context, weights, bilinears, biases, _index, _cu, _workspace, _backend, needs):
    layouts = [_contiguous] * 2 + [_like] * (2 * len(bilinears)) + [_contiguous] * len(biases)
    inputs = (x, context, *weights, *bilinears, *biases)
    return [layout(t) for layout, t, need in zip(layouts, inputs, needs, strict=True) if need]


@_operator(
    "modulated_backward(Tensor[] douts, Tensor x, Tensor context, Tensor?[] weights, Tensor[] bilinears, "
    "Tensor?[] biases, Tensor? context_index, Tensor? cu_seqlens, int workspace_bytes, str backend, bool[] needs) "
    "-> Tensor[]",
    _modulated_backward_fake,
)
def modulated_backward(
    douts, x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend, needs
):
    """The gradients that `needs` asks for, of (x, context, *weights, *bilinears, *biases) in this order."""
    dx, dcontext, dweights, dbilinears, dbiases = implementation(backend, x, "modulated").modulated_backward(
        douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs
    )
    dbiases = [g if g is None else g.to(b.dtype) for g, b in zip(dbiases, biases, strict=True)]
    return _needed((dx, dcontext, *dweights, *dbilinears, *dbiases), needs)


def _lora_fake(x, weight, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[1]))


@_operator(
    "lora_forward(Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str backend) -> Tensor",
    _lora_fake,
)
def lora_forward(x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend):
    """y of a linear layer with an adapter a sequence."""
    return implementation(backend, x, "lora").lora_forward(
        x, weight, A, B, scale, bias, adapter_index, cu_seqlens, workspace_bytes
    )


def _lora_backward_fake(dout, x, weight, A, B, bias, _index, _cu, _scale, _workspace, _backend, needs):
    layouts = (_contiguous, _like, _contiguous, _contiguous, _contiguous)
    return [layout(t) for layout, t, need in zip(layouts, (x, weight, A, B, bias), needs, strict=True) if need]


@_operator(
    "lora_backward(Tensor dout, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? adapter_index, "
    "Tensor? cu_seqlens, float scale, int workspace_bytes, str backend, bool[] needs) -> Tensor[]",
    _lora_backward_fake,
)
def lora_backward(dout, x, weight, A, B, bias, adapter_index, cu_seqlens, scale, workspace_bytes, backend, needs):
    """The gradients that `needs` asks for, of (x, weight, A, B, bias) in this order."""
    *grads, dbias = implementation(backend, x, "lora").lora_backward(
        dout, x, weight, A, B, scale, adapter_index, cu_seqlens, workspace_bytes, needs
    )
    return _needed((*grads, dbias if dbias is None else dbias.to(bias.dtype)), needs)


class _Modulated:
    """How autograd calls the modulated operators; tensors = (x, context, *weights, *bilinears, *biases)."""

    @staticmethod
    def split(tensors):
        n = (len(tensors) - 2) // 3
        x, context, *each = tensors
        return x, context, each[:n], each[n : 2 * n], each[2 * n :]

    @staticmethod
    def forward(tensors, index, cu_seqlens, options):
        run = modulated_forward.over(tensors)
        return tuple(run(*_Modulated.split(tensors), index, cu_seqlens, *options))

    @staticmethod
    def backward(douts, tensors, index, cu_seqlens, options, needs):
        run = modulated_backward.over(tensors)
        return run(list(douts), *_Modulated.split(tensors), index, cu_seqlens, *options, needs)

    @staticmethod
    def reference(tensors, index, cu_seqlens, options):
        x, context, weights, bilinears, biases = _Modulated.split(tensors)
        return tuple(
            reference.modulated_linear_ref(x, context, w, t, b, context_index=index, cu_seqlens=cu_seqlens)
            for w, t, b in zip(weights, bilinears, biases, strict=True)
        )


class _Lora:
    """How autograd calls the lora operators; tensors = (x, weight, A, B, bias)."""

    @staticmethod
    def forward(tensors, index, cu_seqlens, options):
        return (lora_forward.over(tensors)(*tensors, index, cu_seqlens, *options),)

    @staticmethod
    def backward(douts, tensors, index, cu_seqlens, options, needs):
        return lora_backward.over(tensors)(douts[0], *tensors, index, cu_seqlens, *options, needs)

    @staticmethod
    def reference(tensors, index, cu_seqlens, options):
        x, weight, A, B, bias = tensors
        args = (x, weight, A, B, options[0], bias)
        return (reference.lora_linear_ref(*args, adapter_index=index, cu_seqlens=cu_seqlens),)


_FAMILIES = {"modulated": _Modulated, "lora": _Lora}


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, family, index, cu_seqlens, options, *tensors):
        ctx.family, ctx.options = family, options
        ctx.save_for_backward(index, cu_seqlens, *tensors)
        return _FAMILIES[family].forward(tensors, index, cu_seqlens, options)

    @staticmethod
    def backward(ctx, *douts):
        index, cu_seqlens, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Backward.apply(ctx.family, index, cu_seqlens, ctx.options, needs, len(douts), *douts, *tensors)
        else:
            grads = _FAMILIES[ctx.family].backward(douts, tensors, index, cu_seqlens, ctx.options, needs)
        return None, None, None, None, *_spread(grads, needs)


class _Backward(torch.autograd.Function):
    """The gradient as a differentiable function; its own gradient is that of the reference's."""

    @staticmethod
    def forward(ctx, family, index, cu_seqlens, options, needs, n, *tensors):
        ctx.family, ctx.options, ctx.needs, ctx.n = family, options, needs, n
        ctx.save_for_backward(index, cu_seqlens, *tensors)
        return tuple(_FAMILIES[family].backward(tensors[:n], tensors[n:], index, cu_seqlens, options, needs))

    @staticmethod
    def backward(ctx, *seconds):
        index, cu_seqlens, *saved = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that a tensor given twice counts as two inputs
            tensors = [t if t is None else (t if again else t.detach().requires_grad_()).view_as(t) for t in saved]
            douts, inputs = tensors[: ctx.n], tensors[ctx.n :]
            outs = _FAMILIES[ctx.family].reference(inputs, index, cu_seqlens, ctx.options)
            firsts = _grad(outs, _needed(inputs, ctx.needs), douts)
            seconds = [s.to(f.dtype) for s, f in zip(seconds, firsts, strict=True)]
            asked = [t for t, need in zip(tensors, ctx.needs_input_grad[6:], strict=True) if need]
            grads = _grad(firsts, asked, seconds)
        return *[None] * 6, *_spread(grads, ctx.needs_input_grad[6:])


def _grad(outs, inputs, douts):
    """torch.autograd.grad that stays differentiable and gives zeros where outs do not depend on an input."""
    pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    outs, douts = zip(*pairs, strict=True)
    return torch.autograd.grad(outs, inputs, douts, create_graph=True, materialize_grads=True)


def transformed():
    """Whether torch.func or forward-mode differentiation is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def readable(t):
    """The tensor under the wrappers of torch.func, None where it is one of a vmap."""
    functorch = torch._C._functorch
    while t is not None and functorch.is_functorch_wrapped_tensor(t):
        t = None if functorch.is_batchedtensor(t) else functorch.get_unwrapped(t)
    return t


def call(family, tensors, index, cu_seqlens, options):
    """The outputs of a family's operator, differentiable; options end with the name of the backend."""
    ways = _FAMILIES[family]
    if options[-1] == "reference" or transformed():
        return ways.reference(tensors, index, cu_seqlens, options)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return _Forward.apply(family, index, cu_seqlens, options, *tensors)
    return ways.forward(tensors, index, cu_seqlens, options)


def modulated(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes, backend):
    """A tuple of outputs, one a projection."""
    tensors = (x, context, *weights, *bilinears, *biases)
    return call("modulated", tensors, context_index, cu_seqlens, (workspace_bytes, backend))


def lora(x, weight, A, B, bias, scale, adapter_index, cu_seqlens, workspace_bytes, backend):
    """The output of a linear layer with an adapter a sequence."""
    return call("lora", (x, weight, A, B, bias), adapter_index, cu_seqlens, (scale, workspace_bytes, backend))[0]

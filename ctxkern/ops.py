"""How a family's operators meet torch: torch.library, autograd and transforms. Schemas are in `<family>/ops.py`.

A gradient is an operator too, so that compilers and selective checkpointing see both. Of torch.library's routes this
one (define, impl, a thin autograd.Function outside, left out where no gradient is needed) costs least per call.

Kernels read raw pointers, so they are called with plain tensors alone: strided, on a CPU or GPU, with no negative or
conjugate bit, not zero tensors, not batched, traced or fake, and of no subclass. Everything else goes through the
dispatcher, which resolves it or tells a mode, a compiler, a tracer or the profiler. Double backward, forward-mode
differentiation and torch.func take the reference, also where they are entered between the forward and the backward.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import _dispatch_keys, _get_tracing_state
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.library import Library
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .checks import autocast_enabled, check_bounds, check_index, is_readable
from .runtime import cpu

_library = Library("ctxkern", "DEF")


class Options(NamedTuple):
    """Of a call, what is no tensor. backend: the caller's choice, None for the best one. A family may have its own."""

    workspace_bytes: int
    backend: str | None


def operator(schema, fake):
    """Decorator: the function becomes the one kernel, for every device, of the operator with this schema, and the name
    that of the operator."""
    name = schema.split("(")[0]

    def register(fn):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, lambda *args: fn(*(_resolved(arg) for arg in args)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ctxkern::{name}", fake, lib=_library)
        return getattr(torch.ops.ctxkern, name).default

    return register


def isolated(run, operands, *args):
    """run(operands, *args) with autograd and autocast off: a backend computes in the dtypes that it is given."""
    x = operands.x
    if torch._C._is_any_autocast_enabled() and autocast_enabled(x):
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return run(operands, *args)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return run(operands, *args)
    return run(operands, *args)


def _resolved(arg):
    """An argument with no lazy negation and no zero tensor in it; the dispatcher leaves those in lists as they are."""
    if isinstance(arg, list | tuple):
        return [_resolved(t) for t in arg]
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.clone() if arg._is_zerotensor() else arg.resolve_neg()


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_USUAL_TYPES = frozenset((*_PLAIN_TYPES, type(None)))


def is_plain(t):
    """Whether kernels may read the memory of a tensor through its pointer. Of transforms `call` and backward ask."""
    return type(t) in _PLAIN_TYPES and not t.is_neg() and not t._is_zerotensor()


def distributed(tensors):
    """Whether any of them is a DTensor; asking loads nothing."""
    return not _USUAL_TYPES.issuperset(map(type, tensors)) and any(hasattr(t, "device_mesh") for t in tensors)


def together(tensors):
    """Those of a call with DTensors, with plain ones as replicated DTensors; from the first such call on, the operators
    know how they divide over a mesh."""
    from . import sharding

    return sharding.together(tensors)


def direct(tensors):
    """Whether a backend may be called without the dispatcher: all of a tuple are plain or None, and no compiler, mode
    or profiler must see the call. It saves 13 of 75 µs at B=4, S=32, d=64, K=16."""
    return not torch.compiler.is_compiling() and _direct(tensors)


def _direct(tensors):
    """The same outside of a compiler."""
    core = cpu.core()
    if not (all(t is None or is_plain(t) for t in tensors) if core is None else core.plain(tensors)):
        return False
    if torch._C._len_torch_dispatch_stack():
        _tell_flop_counters()
        return False
    return not _profiler_enabled()


_FLOPS: dict[str, Callable] = {}


def flop_formula(name):
    """Decorator: the function is the formula of an operator for torch.utils.flop_counter, of shapes for tensors."""

    def register(fn):
        _FLOPS[name] = fn
        return fn

    return register


def _tell_flop_counters():
    """FLOP formulas are registered when a mode sees a call: torch.utils.flop_counter imports Triton, `import ctxkern`
    does not. Counters take a copy of the registry when they are made, so active ones are given them too."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for name, formula in _FLOPS.items():
        packet = getattr(torch.ops.ctxkern, name)
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if registry is not None:
                registry.setdefault(packet, module.flop_registry[packet])


def like(t):
    """The layout of the gradient of a parameter: its own where that is dense."""
    return torch.empty_like(t)


def contiguous(t):
    return t.new_empty(t.shape)


def needed(flat, needs):
    return [t for t, need in zip(flat, needs, strict=True) if need]


def spread(grads, needs):
    """The opposite of `needed`: None where no gradient was asked for."""
    if len(grads) == len(needs):
        return grads
    grads = iter(grads)
    return [next(grads) if need else None for need in needs]


class Family(NamedTuple):
    """How autograd calls the operators of a family; flat: what `Operands.flat` gives, those without a gradient last."""

    operands: Any
    run: Callable  # (operands, options) → a sequence of outputs, by a backend
    run_backward: Callable  # (operands, options, douts, needs) → gradients, None where not needed; likewise
    forward: Callable  # (operands, options) → a sequence of outputs, by the operator
    backward: Callable  # (operands, options, douts, needs) → gradients that are needed; likewise
    reference: Callable  # (operands, options) → a tuple of outputs
    constants: int  # how many of `flat` have no gradient: indices, bounds and the like


def _forward(family, operands, flat, options):
    if direct(flat):
        return tuple(isolated(family.run, operands, options))
    return tuple(family.forward(operands, options))


def _backward(family, flat, options, douts, needs, compiling):
    """The gradients that `needs` asks for, None for others; where autograd is off."""
    operands = family.operands.of(flat)
    if not compiling and _direct((*douts, *flat)):
        if torch._C._is_any_autocast_enabled():
            return isolated(family.run_backward, operands, options, douts, needs)
        return family.run_backward(operands, options, douts, needs)
    return spread(family.backward(operands, options, douts, needs), needs)


def differentiable(family):
    """The operators of a family as one autograd.Function of (operands, options, *operands.flat()); operands: where a
    call is ordinary and all of them are plain, else None."""
    end, nothing = -family.constants, (None,) * family.constants

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, operands, options, *flat):
            ctx.options = options
            ctx.save_for_backward(*flat)
            if operands is None:
                return _forward(family, family.operands.of(flat), flat, options)
            return tuple(family.run(operands, options))

        @staticmethod
        def backward(ctx, *douts):
            flat, needs = ctx.saved_tensors, ctx.needs_input_grad[2:end]
            core = None if is_dynamo_compiling() else cpu.core()
            if core is not None and core.ordinary_backward(douts, flat):
                grads = family.run_backward(family.operands.of(flat), ctx.options, douts, needs)
                return None, None, *grads, *nothing
            compiling = torch.compiler.is_compiling()
            if not compiling:
                if transformed(*douts):
                    grads = spread(_vjp(family, flat, ctx.options, needs, douts), needs)
                    return None, None, *grads, *nothing
                if torch.is_grad_enabled():
                    grads = spread(Backward.apply(ctx.options, needs, len(douts), *douts, *flat), needs)
                    return None, None, *grads, *nothing
            return None, None, *_backward(family, flat, ctx.options, douts, needs, compiling), *nothing

    # without what Function.apply does for torch.func, a frame of Python for each operand
    Forward.apply_seen = super(torch.autograd.Function, Forward).apply

    class Backward(torch.autograd.Function):
        """The gradient as a differentiable function; its own gradient is that of the reference's."""

        @staticmethod
        def forward(ctx, options, needs, n, *tensors):
            ctx.options, ctx.needs, ctx.n = options, needs, n
            ctx.save_for_backward(*tensors)
            # zeros in place of None would be plain beside DTensors
            ctx.set_materialize_grads(False)
            compiling = torch.compiler.is_compiling()
            return tuple(needed(_backward(family, tensors[n:], options, tensors[:n], needs, compiling), needs))

        @staticmethod
        def backward(ctx, *seconds):
            asked = ctx.needs_input_grad[3:end]
            tensors = _views(ctx.saved_tensors)
            douts, flat = tensors[: ctx.n], tensors[ctx.n :]
            with torch.enable_grad():
                firsts = _vjp(family, flat, ctx.options, ctx.needs, douts, views=False)
                seconds = [None if s is None else s.to(f.dtype) for s, f in zip(seconds, firsts, strict=True)]
                grads = _grad(firsts, needed(tensors[:end], asked), seconds)
            return None, None, None, *spread(grads, asked), *nothing

    return Forward


def _views(tensors):
    """Views, so that a tensor given twice counts as two inputs."""
    with torch.enable_grad():
        return [None if t is None else t.view_as(t) for t in tensors]


def _vjp(family, flat, options, needs, douts, views=True):
    """The gradients that `needs` asks for, of the reference; differentiable where gradients are enabled."""
    flat = _views(flat) if views else flat
    with torch.enable_grad():
        outs = family.reference(family.operands.of(flat), options)
    return _grad(outs, needed(flat[: -family.constants], needs), douts)


def _grad(outs, inputs, douts):
    """torch.autograd.grad that stays differentiable and gives zeros where outs do not depend on an input; None in douts
    stands for zeros too."""
    pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if o.requires_grad and d is not None]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    outs, douts = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    return torch.autograd.grad(outs, inputs, douts, create_graph=again, materialize_grads=True)


def takes_reference():
    """Whether calls record plain operations: under a transform, and under torch.jit.trace, whose graphs have no lists
    of optional tensors."""
    if _get_tracing_state() is not None and not torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed(*tensors):
    """Whether torch.func or forward-mode differentiation is under way, or a tensor is batched or wrapped by one,
    that of an outer call included."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    for t in tensors:
        keys = _dispatch_keys(t)
        raw = keys.raw_repr()
        found = _TRANSFORMED.get(raw)
        if found is None:
            found = _TRANSFORMED[raw] = any(keys.has(key) for key in _TRANSFORMS)
        if found:
            return True
    return False


# by raw key set, as they are met
_TRANSFORMED: dict[int, bool] = {}
_TRANSFORMS = (
    torch._C.DispatchKey.FuncTorchBatched,
    torch._C.DispatchKey.FuncTorchGradWrapper,
    torch._C._dispatch_key_parse("Batched"),
)


def readable(t):
    """The tensor under the wrappers of torch.func; None where its values are out of reach, as in a vmap."""
    functorch = torch._C._functorch
    while t is not None and functorch.is_functorch_wrapped_tensor(t):
        t = None if functorch.is_batchedtensor(t) else functorch.get_unwrapped(t)
    return t if t is not None and is_readable(t) else None


def check_values(x, table, index, cu_seqlens, what="context_index", lowest=0):
    """The values of indices, on the CPU and outside of a compiler; elsewhere torch's own indexing checks them."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    index, cu_seqlens = readable(index), readable(cu_seqlens)
    if index is not None:
        check_index(index, table.shape[0], what, lowest)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[0])


def call(family, function, operands, options, seen=False):
    """The outputs of a family for operands, differentiable; function: that of `differentiable`. seen: the call was
    found `ordinary`, and all operands plain."""
    flat = operands.flat()
    if not seen and distributed(flat):
        flat = together(flat)
        operands = family.operands.of(flat)
    if options.backend == "reference" or (not seen and takes_reference()):
        return family.reference(operands, options)
    if torch.is_grad_enabled():
        for t in flat:
            if t is not None and t.requires_grad:
                if seen:
                    return function.apply_seen(operands, options, *flat)
                return function.apply(None, options, *flat)
    return _forward(family, operands, flat, options)

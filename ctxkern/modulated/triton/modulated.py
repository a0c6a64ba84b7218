"""The modulated operators: which form runs, and what the kernels are given."""

import math

from ctxkern.modulated.operands import (
    check_values,
    contiguous,
    fill_with_biases,
    new_gradients,
    new_outputs,
    rounds_to_tf32,
)
from ctxkern.modulated.plan import Problem, describe, gpu_terms, outer_above
from ctxkern.plan import forced
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.launches import Layout, operands_of
from ctxkern.runtime.triton.tiles import backward_blocks, forward_blocks

from . import outer, panel, persistent
from .call import Call
from .cost import predicted_seconds
from .projections import Projection


def _form(call):
    above = outer_above(gpu_terms(), call.tokens, call.per_token)
    return outer if call.most_contexts > above else panel


def _spans(operands):
    return operands.x, operands.context, operands.context_index, operands.cu_seqlens


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    check_values(operands)
    outs = new_outputs(operands)
    if operands.x.numel():
        biases = [*map(contiguous, operands.biases)]
        _run(_forward, workspace_bytes, _spans(operands), operands.weights, operands.bilinears, biases, outs)
    else:
        fill_with_biases(outs, operands.biases)
    return outs


def _forward(call, weights, bilinears, biases, outs):
    _form(call).forward(call, [*map(Projection, weights, bilinears, biases, outs)])


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    douts = [*map(contiguous, douts)]
    grads = new_gradients(douts, operands, needs)
    if operands.x.numel() and any(dout.numel() for dout in douts):
        if grads.from_kernels():
            parameters = operands.weights, operands.bilinears
            wanted = grads.weights, grads.bilinears, (grads.x, grads.context)
            _run(_backward, workspace_bytes, _spans(operands), *parameters, douts, *wanted)
    else:
        for grad in grads.from_kernels():
            grad.zero_()
    return grads


def _backward(call, weights, bilinears, douts, dweights, dbilinears, shared):
    absent = [None] * len(douts)
    _form(call).backward(call, [*map(Projection, weights, bilinears, absent, douts, dweights, dbilinears)], *shared)


# launches by all that they depend on; so many calls of different sizes, and they are laid out anew
_KEPT, _MOST_KEPT = {}, 1024
tiles.AFTER.append(_KEPT.clear)


def _run(lay_out, workspace_bytes, spans, *lists):
    """Runs what `lay_out` lays out for a `Call` and lists of operands in place of those of tensors."""
    x = spans[0]
    tensors = [*map(contiguous, spans)]
    for each in lists:
        tensors += each
    switches = forced.strategy, rounds_to_tf32(x.dtype)
    key = (lay_out, len(lists[0]), workspace_bytes, x.device, switches, *map(_layout, tensors))
    launches = _KEPT.get(key)
    if launches is None:
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        launches = _KEPT[key] = _laid_out(lay_out, workspace_bytes, tensors, list(map(len, lists)))
    launches.run(tensors, x.device)


def _laid_out(lay_out, workspace_bytes, tensors, sizes):
    layout, operands = Layout(len(tensors)), operands_of(tensors)
    spans, lists = [next(operands) for _ in range(4)], [[next(operands) for _ in range(size)] for size in sizes]
    lay_out(Call(spans, lists[1], workspace_bytes, tensors[0].device, layout), *lists)
    return layout.done()


def _layout(t):
    """What of a tensor a launch depends on."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16)


def plan(operands, workspace_bytes, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    x, bilinear = operands.x, operands.bilinears[0]
    *spans, operand = operands_of((*_spans(operands), bilinear))
    call = Call(spans, [operand], workspace_bytes, x.device, Layout(5))
    d_in, d_out, k = bilinear.shape
    contexts, param_dtype = call.most_contexts, operands.param_dtype
    strategy = "outer" if _form(call) is outer else "panel"
    has_weight = operands.weights[0] is not None
    problem = Problem(call.tokens, contexts, d_in, d_out, k, x.dtype, param_dtype, "cuda", call.per_token, has_weight)
    made, one_launch = None, strategy == "panel" and not backward and persistent.runs(call, (d_out,))
    if strategy == "outer":
        strip, group, used = d_out, call.tokens, 0
    elif backward:
        made = backward_blocks(call.tokens, d_in, (d_out,), k, contexts, x.dtype, param_dtype, workspace_bytes)
        strip, group, used = made.rows, made.group, 2 * math.prod(made) * x.dtype.itemsize
    else:
        sizes = d_in, (d_out,), contexts, x.dtype, workspace_bytes
        made = persistent.blocks_of(call, (d_out,)) if one_launch else forward_blocks(*sizes)
        strip, group, used = made.width, made.group, math.prod(made) * x.dtype.itemsize
    predicted = None
    if call.tokens and contexts:
        predicted = predicted_seconds(problem, strategy, made, backward, one_launch)
    return describe(
        problem,
        strategy=strategy,
        backend="triton",
        strip=strip,
        group=group,
        workspace_bytes=used,
        strip_of="D" if backward else "E",
        predicted_seconds=predicted,
    )

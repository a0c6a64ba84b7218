"""The modulated operators: which form runs, and what the kernels are given."""

import math

import torch

from ctxkern import plan as planner
from ctxkern.modulated.shared import (
    check_values,
    contiguous,
    fill_with_biases,
    gradients,
    outputs,
    rounds_to_tf32,
)
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.launches import Layout, operands_of
from ctxkern.runtime.triton.tiles import backward_blocks, forward_blocks

from . import outer, panel, persistent
from .call import Call
from .cost import predicted_seconds
from .projections import Projection


def _form(call):
    few = call.tokens <= planner.GPU_OUTER_ROWS * call.most_contexts
    return outer if call.per_token or few else panel


def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes):
    """[y], one a projection, in the dtype of x and the leading shape of x."""
    check_values(x, context, context_index, cu_seqlens)
    outs = outputs(x, bilinears)
    if x.numel():
        spans = x, context, context_index, cu_seqlens
        _run(_forward, workspace_bytes, spans, weights, bilinears, [*map(contiguous, biases)], outs)
    else:
        fill_with_biases(outs, biases)
    return outs


def _forward(call, weights, bilinears, biases, outs):
    _form(call).forward(call, [*map(Projection, weights, bilinears, biases, outs)])


def modulated_backward(douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` (the same five, flat) asks for none."""
    check_values(x, context, context_index, cu_seqlens)
    douts = [*map(contiguous, douts)]
    grads = gradients(douts, x, context, weights, bilinears, needs)
    if x.numel() and any(dout.numel() for dout in douts):
        if grads.left():
            spans = x, context, context_index, cu_seqlens
            wanted = grads.dweights, grads.dbilinears, (grads.dx, grads.dcontext)
            _run(_backward, workspace_bytes, spans, weights, bilinears, douts, *wanted)
    else:
        for grad in grads.left():
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
    switches = planner.GPU_OUTER_ROWS, planner.GPU_PERSISTENT, rounds_to_tf32(x.dtype)
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


def plan_call(x, context, weight, bilinear, context_index, cu_seqlens, workspace_bytes, backend, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    *spans, operand = operands_of((x, context, context_index, cu_seqlens, bilinear))
    call = Call(spans, [operand], workspace_bytes, x.device, Layout(5))
    d_in, d_out, k = bilinear.shape
    contexts = call.most_contexts
    param_dtype = torch.promote_types(bilinear.dtype, context.dtype)
    strategy = "outer" if _form(call) is outer else "panel"
    problem = planner.Problem(
        call.tokens, contexts, d_in, d_out, k, x.dtype, param_dtype, "cuda", call.per_token, weight is not None
    )
    flops, moved = planner.counts(problem, strategy)
    made, one_launch = None, strategy == "panel" and not backward and persistent.runs(call, (d_out,))
    if strategy == "outer":
        blocks, used = (d_out, call.tokens), 0
    elif backward:
        made = backward_blocks(call.tokens, d_in, (d_out,), k, contexts, x.dtype, param_dtype, workspace_bytes)
        blocks, used = (made.rows, made.group), 2 * math.prod(made) * x.dtype.itemsize
    else:
        sizes = d_in, (d_out,), contexts, x.dtype, workspace_bytes
        made = persistent.blocks_of(call, (d_out,)) if one_launch else forward_blocks(*sizes)
        blocks, used = (made.width, made.group), math.prod(made) * x.dtype.itemsize
    return planner.Plan(
        strategy,
        backend,
        *problem[:5],
        *blocks,
        flops,
        moved,
        used,
        2 * call.tokens * d_in * d_out,
        *planner.floor(problem, flops, moved),
        "D" if backward else "E",
        contexts if strategy == "panel" else 0,
        predicted_seconds(problem, strategy, made, backward, one_launch) if call.tokens and contexts else None,
    )

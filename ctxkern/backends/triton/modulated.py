"""The modulated operators: which form runs, and what the kernels are given."""

import math

import torch

from ctxkern import planner
from ctxkern.backends.shared import check_values, contiguous, fill_with_biases, gradients, outputs

from . import outer, panel, persistent
from .call import Call
from .cost import predicted_seconds
from .projections import Projection
from .tiles import backward_blocks, forward_blocks


def _form(call):
    few = call.tokens <= planner.GPU_OUTER_ROWS * call.most_contexts
    return outer if call.per_token or few else panel


def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes):
    """[y], one a projection, in the dtype of x and the leading shape of x."""
    check_values(x, context, context_index, cu_seqlens)
    outs = outputs(x, bilinears)
    call = Call(x, context, bilinears, context_index, cu_seqlens, workspace_bytes)
    if call.tokens and call.d_in:
        with call.device():
            members = zip(weights, bilinears, biases, outs, strict=True)
            _form(call).forward(call, [Projection(*parts) for parts in members])
    else:
        fill_with_biases(outs, biases)
    return outs


def modulated_backward(douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` (the same five, flat) asks for none."""
    check_values(x, context, context_index, cu_seqlens)
    douts = [contiguous(dout) for dout in douts]
    grads = gradients(douts, x, context, weights, bilinears, needs)
    if grads.left():
        call = Call(x, context, bilinears, context_index, cu_seqlens, workspace_bytes)
        if call.tokens and call.d_in and any(t.shape[1] for t in bilinears):
            with call.device():
                members = zip(
                    weights, bilinears, [None] * len(douts), douts, grads.dweights, grads.dbilinears, strict=True
                )
                _form(call).backward(call, [Projection(*parts) for parts in members], grads.dx, grads.dcontext)
        else:
            for grad in grads.left():
                grad.zero_()
    return grads


def plan_call(x, context, weight, bilinear, context_index, cu_seqlens, workspace_bytes, backend, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    call = Call(x, context, [bilinear], context_index, cu_seqlens, workspace_bytes)
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

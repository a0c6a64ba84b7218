"""The modulated operators: which form runs, and what the kernels are given."""

import math

import torch

from ctxkern import planner
from ctxkern._check import check_bounds, check_index

from . import outer, panel, persistent
from .call import Call, contiguous
from .cost import predicted_seconds
from .projections import Projection
from .tiles import backward_blocks, forward_blocks


def _form(call):
    few = call.tokens <= planner.GPU_OUTER_ROWS * call.most_contexts
    return outer if call.per_token or few else panel


def _check_values(x, context, context_index, cu_seqlens):
    """On the CPU, where the interpreter runs; on a GPU the kernels check."""
    if x.device.type != "cpu":
        return
    if context_index is not None:
        check_index(context_index, context.shape[0], "context_index")
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[0])


def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes):
    """[y], one a projection, in the dtype of x and the leading shape of x."""
    _check_values(x, context, context_index, cu_seqlens)
    outs = [x.new_empty((*x.shape[:-1], t.shape[1])) for t in bilinears]
    call = Call(x, context, bilinears, context_index, cu_seqlens, workspace_bytes)
    if call.tokens and call.d_in:
        with call.device():
            members = zip(weights, bilinears, biases, outs, strict=True)
            _form(call).forward(call, [Projection(*parts) for parts in members])
    else:
        for out, bias in zip(outs, biases, strict=True):
            out.copy_(out.new_zeros(()) if bias is None else bias)
    return outs


def modulated_backward(douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` (the same five, flat) asks for none."""
    _check_values(x, context, context_index, cu_seqlens)
    n = len(bilinears)
    need_x, need_context, *each = needs
    need_w, need_t, need_b = each[:n], each[n : 2 * n], each[2 * n :]
    douts = [contiguous(dout) for dout in douts]
    dweights = [torch.empty_like(w) if need else None for w, need in zip(weights, need_w, strict=True)]
    dbilinears = [torch.empty_like(t) if need else None for t, need in zip(bilinears, need_t, strict=True)]
    leading = tuple(range(x.dim() - 1))
    dbiases = [dout.sum(leading) if need else None for dout, need in zip(douts, need_b, strict=True)]
    dx = x.new_empty(x.shape) if need_x else None
    dcontext = context.new_zeros(context.shape) if need_context else None
    grads = dx, dcontext, dweights, dbilinears
    if need_x or need_context or any(need_w) or any(need_t):
        call = Call(x, context, bilinears, context_index, cu_seqlens, workspace_bytes)
        if call.tokens and call.d_in and any(t.shape[1] for t in bilinears):
            with call.device():
                members = zip(weights, bilinears, [None] * n, douts, dweights, dbilinears, strict=True)
                _form(call).backward(call, [Projection(*parts) for parts in members], dx, dcontext)
        else:
            for grad in (dx, *dweights, *dbilinears):
                if grad is not None:
                    grad.zero_()
    return *grads, dbiases


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

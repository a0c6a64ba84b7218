"""Modulated projections, forward and backward, choosing panel or outer a projection.

Several projections (q, k and v) share one x, one context and so one grouping of rows. Gradients come back only where
`needs` asks for them.
"""

from dataclasses import replace

import torch

from ctxkern.checks import is_readable
from ctxkern.dtypes import accumulator
from ctxkern.modulated.operands import Gradients
from ctxkern.modulated.plan import Problem
from ctxkern.plan import compute_dtype
from ctxkern.runtime.rows import Bucket, Rows, group_rows

from . import tiles, whole
from .call import Call, Partial
from .outer import outer_backward, outer_forward
from .panel import panel_backward, panel_forward


def problem_of(x, context, weight, bilinear, rows, per_token, backward=False):
    """The planner's view of a call; x [..., D]."""
    d_in, d_out, context_dim = bilinear.shape
    tokens = x.shape[:-1].numel()
    stride = bilinear.stride()
    param_dtype = torch.promote_types(bilinear.dtype, context.dtype)
    half = param_dtype.itemsize == 2 and compute_dtype(x.device.type, x.dtype).itemsize == 2
    return Problem(
        tokens,
        tokens if per_token else rows.contexts,
        d_in,
        d_out,
        context_dim,
        x.dtype,
        param_dtype,
        x.device.type,
        per_token,
        weight is not None,
        stride[2] != 1 or (half and stride[1] != context_dim),
        backward,
        0 if rows.spread is None else rows.spread.numel(),
    )


def plan(operands, workspace_bytes, backward, backend="portable"):
    """The plan of one projection; with its index or bounds out of reach (another device), that of the worst case."""
    x, context, (weight,), (bilinear,), _, context_index, cu_seqlens = operands
    per_token = operands.per_token
    hidden = any(t is not None and not is_readable(t) for t in (context_index, cu_seqlens))
    if per_token or not hidden:
        rows = _group(x, context, [bilinear], context_index, cu_seqlens)
    else:
        batch = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        rows = Rows([], min(batch, len(context)))
    problem = problem_of(x, context, weight, bilinear, rows, per_token, backward)
    if backend == "reference" and not per_token:
        problem = problem._replace(contexts=len(context if context_index is None else context_index))
    planned = tiles.plan(problem, workspace_bytes, backend)
    if hidden or context_index is None or cu_seqlens is not None or backend == "reference":
        return planned
    once = tiles.plan(problem._replace(contexts=len(set(context_index.tolist()))), workspace_bytes)
    return replace(
        once, strategy=planned.strategy, strip=planned.strip, group=planned.group, weights_made=problem.contexts
    )


def _group(x, context, bilinears, context_index, cu_seqlens):
    if context.dim() == 3:
        batch, seq = x.shape[:2]
        return Rows([Bucket(0, batch * seq, 0, 1)], batch * seq)

    def worth_sharing(sequences, contexts):
        return any(tiles.sharing_pays(sequences, contexts, t.shape) for t in bilinears)

    return group_rows(x, context.shape[0], context_index, cu_seqlens, worth_sharing=worth_sharing)


def _even(rows, context):
    """Whether every context has equally many rows."""
    return context.dim() == 2 and len(rows.buckets) == 1 and rows.spread is None


def _token_contexts(rows, context, tokens):
    """The context of every grouped row, [N, K]."""
    if context.dim() == 3:
        return context.reshape(tokens, -1)
    if rows.spread is not None:
        return context.index_select(0, rows.spread).repeat_interleave(rows.buckets[0].rows, 0, output_size=tokens)
    # of one bucket a number: nothing is copied to the device
    repeats = rows.buckets[0].rows
    if len(rows.buckets) > 1:
        repeats = torch.tensor([b.rows for b in rows.buckets for _ in range(b.count)], device=context.device)
    return rows.pick(context).repeat_interleave(repeats, 0, output_size=tokens)


def _empty(x, bilinear):
    return x.numel() == 0 or bilinear.numel() == 0


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    x, context, weights, bilinears, biases, context_index, cu_seqlens = operands
    if context_index is None and cu_seqlens is None and context.dim() == 2:
        # nothing to group
        if whole.fits(x, context, weights, bilinears, *x.shape[:2], workspace_bytes):
            return whole.forward(x, context, weights, bilinears, biases)
    rows = _group(x, context, bilinears, context_index, cu_seqlens)
    if _even(rows, context) and whole.fits(x, context, weights, bilinears, *rows.even, workspace_bytes):
        outs = whole.forward(rows.batch(x), rows.pick(context), weights, bilinears, biases)
        return [rows.scatter(y, x) for y in outs]
    compute = compute_dtype(x.device.type, x.dtype)
    grouped = _cast(rows.gather(x), compute)
    outs = []
    for weight, bilinear, bias in zip(weights, bilinears, biases, strict=True):
        if _empty(x, bilinear):
            y = _plain(grouped, weight, bilinear.shape[1])
        else:
            call, planned = _plan(x, context, weight, bilinear, rows, grouped, compute, workspace_bytes, False)
            y = (outer_forward if planned.strategy == "outer" else panel_forward)(call, planned)
        if bias is not None:
            y.add_(bias)
        outs.append(rows.scatter(_cast(y, x.dtype), x))
    return outs


def _plan(x, context, weight, bilinear, rows, grouped, compute, workspace_bytes, backward):
    """(Call, Plan) of one projection."""
    problem = problem_of(x, context, weight, bilinear, rows, context.dim() == 3, backward)
    planned = tiles.plan(problem, workspace_bytes)
    contexts = _token_contexts(rows, context, len(grouped)) if planned.strategy == "outer" else rows.pick(context)
    return Call(grouped, contexts, rows, weight, bilinear, compute), planned


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    x, context, weights, bilinears, biases, context_index, cu_seqlens = operands
    if context_index is None and cu_seqlens is None and context.dim() == 2:
        # nothing to group
        if whole.fits(x, context, weights, bilinears, *x.shape[:2], workspace_bytes):
            return Gradients(*whole.backward(douts, x, context, weights, bilinears, biases, needs))
    rows = _group(x, context, bilinears, context_index, cu_seqlens)
    if _even(rows, context) and whole.fits(x, context, weights, bilinears, *rows.even, workspace_bytes):
        douts = [rows.batch(dout) for dout in douts]
        dx, dcontext, *rest = whole.backward(
            douts, rows.batch(x), rows.pick(context), weights, bilinears, biases, needs
        )
        dx = None if dx is None else rows.scatter(dx, x)
        dcontext = None if dcontext is None else _cast(rows.unpick(dcontext, len(context)), context.dtype)
        return Gradients(dx, dcontext, *rest)
    compute = compute_dtype(x.device.type, x.dtype)
    grouped = _cast(rows.gather(x), compute)
    n = len(bilinears)
    need_x, need_context, need_w, need_t, need_b = needs
    dx = dcontext = None
    dweights, dbilinears, dbiases = [None] * n, [None] * n, [None] * n
    for i, (dout, weight, bilinear) in enumerate(zip(douts, weights, bilinears, strict=True)):
        if need_b[i]:
            dbiases[i] = dout.flatten(0, -2).sum(0, dtype=accumulator(dout.dtype)).to(biases[i].dtype)
        dy = _cast(rows.gather(dout), compute)
        if _empty(x, bilinear):
            grads = Partial(dx, need_x, False, need_w[i], need_t[i])
            _plain_backward(grouped, dy, weight, bilinear, grads)
        else:
            call, planned = _plan(x, context, weight, bilinear, rows, grouped, compute, workspace_bytes, True)
            grads = Partial(dx, need_x, need_context, need_w[i], need_t[i])
            (outer_backward if planned.strategy == "outer" else panel_backward)(call, planned, dy, grads)
            if need_context:
                part = _to_table(grads.contexts, rows, context, planned.strategy == "outer")
                dcontext = part if dcontext is None else dcontext.to(accumulator(part.dtype)).add_(part)
        dx, dweights[i], dbilinears[i] = grads.x, grads.weight, grads.bilinear
    if need_x:
        dx = rows.scatter(_cast(dx, x.dtype), x)
    if need_context:
        dcontext = context.new_zeros(context.shape) if dcontext is None else _cast(dcontext, context.dtype)
    return Gradients(dx, dcontext, dweights, dbilinears, dbiases)


def _to_table(dcontexts, rows, context, a_token):
    """The gradient of the context table from that of each context (panel), or of each row's (outer)."""
    if context.dim() == 3:
        return dcontexts.view(context.shape)
    if a_token:
        dcontexts = torch.cat([dcontexts[s : s + c * r].view(c, r, -1).sum(1) for _, c, s, r in rows.buckets])
    if rows.spread is not None:
        table = dcontexts.new_zeros(context.shape)
        return table.index_put_((rows.spread,), dcontexts, accumulate=True)
    return rows.unpick(dcontexts, context.shape[0])


def _cast(t, dtype):
    """t.to(dtype), without the microsecond that it costs where nothing changes."""
    return t if t.dtype is dtype else t.to(dtype)


def _plain(x, weight, d_out):
    """x @ weight: what is left where K, or a size of the batch, is zero."""
    return x.new_zeros(len(x), d_out) if weight is None else x @ weight.to(x.dtype)


def _plain_backward(x, dy, weight, bilinear, grads):
    if grads.need_x:
        dx = torch.zeros_like(x) if weight is None else dy @ _cast(weight, dy.dtype).mT
        grads.x = dx if grads.x is None else grads.x.add_(dx)
    if grads.need_weight:
        grads.weight = torch.empty_like(weight).copy_(x.mT @ dy)
    if grads.need_bilinear:
        grads.bilinear = torch.zeros_like(bilinear)

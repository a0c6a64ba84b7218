"""Modulated projections, forward and backward, choosing panel or outer a projection.

Several projections (q, k and v) share one x, one context and so one grouping of rows. Gradients come back only where
`needs` asks for them.
"""

from dataclasses import dataclass

import torch

from ctxkern.planner import Problem, compute_dtype, plan_modulated

from .outer import outer_backward, outer_forward
from .panel import panel_backward, panel_forward
from .rows import Bucket, Rows, group_rows


@dataclass(slots=True)
class Call:
    """One projection: grouped rows of x [N, D], contexts [U, K] (or one a row, [N, K]) and its parameters."""

    x: torch.Tensor
    contexts: torch.Tensor
    rows: Rows
    weight: torch.Tensor | None
    bilinear: torch.Tensor
    compute: torch.dtype


def problem_of(x, context, weight, bilinear, rows, per_token, backward=False):
    """The planner's view of a call; x [..., D]."""
    d_in, d_out, context_dim = bilinear.shape
    tokens = x.shape[:-1].numel()
    stride = bilinear.stride()
    return Problem(
        tokens,
        tokens if per_token else rows.contexts,
        d_in,
        d_out,
        context_dim,
        x.dtype,
        torch.promote_types(bilinear.dtype, context.dtype),
        x.device.type,
        per_token,
        weight is not None,
        stride[2] != 1 or stride[1] != context_dim,
        backward,
        0 if rows.spread is None else rows.spread.numel(),
    )


def plan_call(x, context, weight, bilinear, context_index, cu_seqlens, workspace_bytes, backend, backward):
    """The plan of one projection; with its index or bounds out of reach (another device), that of the worst case."""
    per_token = context.dim() == 3
    hidden = any(t is not None and t.device.type != "cpu" for t in (context_index, cu_seqlens))
    if per_token or not hidden:
        rows = _group(x, context, context_index, cu_seqlens)
    else:
        batch = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        rows = Rows([], min(batch, len(context)))
    problem = problem_of(x, context, weight, bilinear, rows, per_token, backward)
    if backend == "reference" and not per_token:
        problem = problem._replace(contexts=len(context if context_index is None else context_index))
    return plan_modulated(problem, workspace_bytes, backend)


def _group(x, context, context_index, cu_seqlens):
    if context.dim() == 3:
        batch, seq = x.shape[:2]
        return Rows([Bucket(0, batch * seq, 0, 1)], batch * seq)
    return group_rows(x, context.shape[0], context_index, cu_seqlens)


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


def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes):
    """[y], one a projection, in the dtype of x and the leading shape of x."""
    rows = _group(x, context, context_index, cu_seqlens)
    compute = compute_dtype(x.device.type, x.dtype)
    per_token = context.dim() == 3
    grouped = rows.gather(x).to(compute)
    outs = []
    for weight, bilinear, bias in zip(weights, bilinears, biases, strict=True):
        if _empty(x, bilinear):
            y = _plain(grouped, weight, bilinear.shape[1])
        else:
            plan = plan_modulated(problem_of(x, context, weight, bilinear, rows, per_token), workspace_bytes)
            outer = plan.strategy == "outer"
            contexts = _token_contexts(rows, context, len(grouped)) if outer else rows.pick(context)
            call = Call(grouped, contexts, rows, weight, bilinear, compute)
            y = (outer_forward if outer else panel_forward)(call, plan)
        if bias is not None:
            y.add_(bias)
        outs.append(rows.scatter(y.to(x.dtype), x))
    return outs


def modulated_backward(douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` (the same five, flat) asks for none."""
    rows = _group(x, context, context_index, cu_seqlens)
    compute = compute_dtype(x.device.type, x.dtype)
    per_token = context.dim() == 3
    grouped = rows.gather(x).to(compute)
    n = len(bilinears)
    need_x, need_context, *each = needs
    need_w, need_t, need_b = each[:n], each[n : 2 * n], each[2 * n :]
    dx = grouped.new_zeros(grouped.shape) if need_x else None
    dcontext = context.new_zeros(context.shape, dtype=_accumulator(context.dtype)) if need_context else None
    dweights, dbilinears, dbiases = [None] * n, [None] * n, [None] * n
    for i, (dout, weight, bilinear) in enumerate(zip(douts, weights, bilinears, strict=True)):
        if need_b[i]:
            dbiases[i] = _column_sum(dout)
        if need_t[i]:
            dbilinears[i] = torch.empty_like(bilinear)
        if need_w[i]:
            dweights[i] = torch.empty_like(weight)
        dy = rows.gather(dout).to(compute)
        if _empty(x, bilinear):
            _plain_backward(grouped, dy, weight, dx, dweights[i], dbilinears[i])
            continue
        plan = plan_modulated(problem_of(x, context, weight, bilinear, rows, per_token, backward=True), workspace_bytes)
        outer = plan.strategy == "outer"
        contexts = _token_contexts(rows, context, len(grouped)) if outer else rows.pick(context)
        call = Call(grouped, contexts, rows, weight, bilinear, compute)
        dcontexts = (outer_backward if outer else panel_backward)(
            call, plan, dy, dx, dweights[i], dbilinears[i], need_context
        )
        if need_context:
            dcontext += _to_table(dcontexts, rows, context, outer)
    if need_x:
        dx = rows.scatter(dx.to(x.dtype), x)
    if need_context:
        dcontext = dcontext.to(context.dtype)
    return dx, dcontext, dweights, dbilinears, dbiases


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


def _accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def _column_sum(dout):
    return dout.flatten(0, -2).sum(0, dtype=_accumulator(dout.dtype))


def _plain(x, weight, d_out):
    """x @ weight: what is left where K, or a size of the batch, is zero."""
    return x.new_zeros(len(x), d_out) if weight is None else x @ weight.to(x.dtype)


def _plain_backward(x, dy, weight, dx, dweight, dbilinear):
    if dx is not None and weight is not None:
        dx.addmm_(dy, weight.to(dy.dtype).mT)
    if dweight is not None:
        dweight.copy_(x.mT @ dy)
    if dbilinear is not None:
        dbilinear.zero_()

"""Laws that hold whatever the shapes: linearity, permutation, sharing, splitting, packing, strides, a plan's counts."""

from dataclasses import replace
from functools import partial

import torch
from helpers.drawn import bounded, cases
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import ctxkern
from ctxkern.testing.cases import make_inputs
from ctxkern.testing.oracle import check, run

seeds = st.integers(0, 1 << 16)
workspaces = st.sampled_from((1, 100, 1 << 10, 1 << 13, None))


def outputs(inputs, fn=ctxkern.modulated_linear, **how):
    positional, keyword = inputs.arguments()
    return fn(*positional, **keyword, **how)


def double(case, seed):
    return make_inputs(case, torch.float64, seed=seed)


@bounded
@given(cases(), seeds, workspaces, st.floats(-2, 2), st.floats(-2, 2))
def test_linear_in_the_context(case, seed, workspace, a, b):
    inputs = replace(double(case, seed), weight=None, bias=None)
    other = torch.randn(inputs.context.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = partial(outputs, workspace_bytes=workspace)
    together = f(replace(inputs, context=a * inputs.context + b * other))
    assert_close(together, a * f(inputs) + b * f(replace(inputs, context=other)))


@bounded
@given(cases(), seeds, workspaces)
def test_a_zero_context_leaves_the_shared_layer(case, seed, workspace):
    inputs = double(case, seed)
    y = outputs(replace(inputs, context=torch.zeros_like(inputs.context)), workspace_bytes=workspace)
    want = torch.zeros_like(y) if inputs.weight is None else inputs.x @ inputs.weight
    assert_close(y, want if inputs.bias is None else want + inputs.bias)


@bounded
@given(cases(packed=False), seeds, workspaces, st.randoms(use_true_random=False))
def test_permuting_sequences_permutes_outputs(case, seed, workspace, random):
    inputs = double(case, seed)
    order = random.sample(range(case.B), case.B)
    moved = replace(inputs, x=inputs.x[order], dy=inputs.dy[order])
    if case.index is not None:
        moved = replace(moved, context_index=inputs.context_index[order])
    else:
        moved = replace(moved, context=inputs.context[order])
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    got, want = run(fn, moved), run(fn, inputs)
    for name in ("y", "dx") if case.index is not None else ("y", "dx", "dcontext"):
        want[name] = want[name][order]
    assert_close(got, want)


@bounded
@given(cases(per_token=False, indexed=True), seeds, workspaces)
def test_shared_contexts_are_repeated_contexts(case, seed, workspace):
    inputs = double(case, seed)
    repeated = replace(inputs, context=inputs.context[inputs.context_index], context_index=None)
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    got, want = run(fn, inputs), run(fn, repeated)
    want["dcontext"] = torch.zeros_like(inputs.context).index_add_(0, inputs.context_index, want["dcontext"])
    assert_close(got, want)


@bounded
@given(cases(per_token=False, packed=False, indexed=False), seeds, workspaces)
def test_a_context_per_token_may_be_that_of_its_sequence(case, seed, workspace):
    inputs = double(case, seed)
    spread = replace(inputs, context=inputs.context[:, None].expand(case.B, case.S, case.K))
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    got, want = run(fn, spread), run(fn, inputs)
    got["dcontext"] = got["dcontext"].sum(1)
    assert_close(got, want)


@bounded
@given(cases(packed=False), seeds, workspaces, st.data())
def test_a_split_batch_is_the_whole(case, seed, workspace, data):
    inputs = double(case, seed)
    at = data.draw(st.integers(0, case.B))
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)

    def part(span):
        cut = replace(inputs, x=inputs.x[span], dy=inputs.dy[span])
        if case.index is None:
            return replace(cut, context=inputs.context[span])
        return replace(cut, context_index=inputs.context_index[span])

    whole, first, second = run(fn, inputs), run(fn, part(slice(0, at))), run(fn, part(slice(at, None)))
    by_sequence = {"y", "dx"} | ({"dcontext"} if case.index is None else set())
    joined = {
        name: torch.cat((first[name], second[name])) if name in by_sequence else first[name] + second[name]
        for name in whole
    }
    assert_close(whole, joined)


@bounded
@given(cases(per_token=False, packed=True), seeds, workspaces)
def test_packed_is_padded(case, seed, workspace):
    inputs = double(case, seed)
    longest = max(case.lengths, default=0)
    present = torch.arange(longest) < torch.tensor(case.lengths, dtype=torch.int64)[:, None]

    def padded(t):
        return t.new_zeros(case.B, longest, t.shape[-1]).masked_scatter_(present[:, :, None], t)

    unpacked = replace(inputs, x=padded(inputs.x), dy=padded(inputs.dy), cu_seqlens=None)
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    got, want = run(fn, inputs), run(fn, unpacked)
    assert_close(got, want | {name: want[name][present] for name in ("y", "dx")})


@bounded
@given(cases(), seeds, st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)), workspaces)
def test_any_shape_and_workspace_matches_the_oracle(case, seed, dtype, workspace):
    fn = partial(ctxkern.modulated_linear, workspace_bytes=workspace)
    check(fn, make_inputs(case, dtype, seed=seed), case)


@st.composite
def relaid(draw, t):
    """The same values with other strides: dimensions permuted, gaps between the elements, an offset."""
    if t is None:
        return None
    order = draw(st.permutations(range(t.dim())))
    gaps = [draw(st.integers(1, 3)) for _ in range(t.dim())]
    wide = t.new_full([s * g + 1 for s, g in zip(t.permute(order).shape, gaps, strict=True)], float("nan"))
    view = wide[tuple(slice(1, None, g) for g in gaps)]
    view = view[tuple(slice(0, s) for s in t.permute(order).shape)]
    view = view.permute([order.index(i) for i in range(t.dim())])
    return view.copy_(t)


@bounded
@given(cases(least=1), seeds, workspaces, st.sampled_from((torch.float32, torch.bfloat16)), st.data())
def test_any_strides_match_the_oracle(case, seed, workspace, dtype, data):
    inputs = make_inputs(case, dtype, seed=seed).map(lambda t: data.draw(relaid(t)))
    check(partial(ctxkern.modulated_linear, workspace_bytes=workspace), inputs, case)


@bounded
@given(cases(per_token=False, least=1), seeds, st.data())
def test_a_sequence_sees_its_own_context_alone(case, seed, data):
    inputs = double(case, seed)
    row = data.draw(st.integers(0, len(inputs.context) - 1))
    poisoned = inputs.context.clone()
    poisoned[row] = float("nan")
    index = range(case.B) if case.index is None else case.index
    lengths = case.lengths or (case.S,) * case.B
    own = torch.tensor([u == row for u, n in zip(index, lengths, strict=True) for _ in range(n)], dtype=torch.bool)
    y = outputs(replace(inputs, context=poisoned)).flatten(0, -2)
    assert y[own].isnan().all()
    assert not y[~own].isnan().any()


sizes = st.integers(0, 300)


@st.composite
def problems(draw):
    """Arguments of `explain` on the meta device, of any size, and the number of contexts in use."""
    B, S, D, E, K = (draw(sizes) for _ in range(5))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
    per_token = draw(st.booleans())
    meta = partial(torch.empty, device="meta", dtype=dtype)
    weight = meta(D, E) if draw(st.booleans()) else None
    return meta(B, S, D), meta(B, S, K) if per_token else meta(B, K), weight, meta(D, E, K)


budgets = st.integers(1, 1 << 26)


def shapes(x, bilinear):
    return x.shape[0] * x.shape[1], *bilinear.shape


@bounded
@given(problems(), budgets, st.booleans())
def test_the_plan_keeps_to_the_workspace(problem, budget, backward):
    plan = ctxkern.explain(*problem, workspace_bytes=budget, backward=backward)
    least = ctxkern.explain(*problem, workspace_bytes=1, backward=backward).workspace_bytes
    assert plan.workspace_bytes <= max(budget, least)


@bounded
@given(problems())
def test_the_least_workspace_is_a_row_or_column_of_one_weight(problem):
    x, _, _, bilinear = problem
    _, d_in, d_out, context_dim = shapes(x, bilinear)
    plan = ctxkern.explain(*problem, workspace_bytes=1)
    unit = max(d_in, d_out) if plan.strategy == "panel" else context_dim
    assert plan.workspace_bytes <= unit * x.dtype.itemsize


@bounded
@given(problems(), budgets)
def test_the_plan_counts_as_the_formulas_do(problem, budget):
    x, context, weight, bilinear = problem
    N, D, E, K = shapes(x, bilinear)
    U = context.shape[:-1].numel()
    plan = ctxkern.explain(*problem, workspace_bytes=budget)
    shared = 0 if weight is None else 2 * N * D * E
    flops = {"panel": 2 * N * D * E + 2 * U * D * E * K, "outer": shared + 2 * N * D * E * K}
    assert plan.strategy in flops
    assert context.dim() == 2 or plan.strategy == "outer"
    # D == 0 leaves no element of x by which to count its rows
    assert (plan.tokens, plan.contexts, plan.d_in, plan.d_out, plan.context_dim) == (N, U, D, E, K)
    assert plan.flops == flops[plan.strategy]
    assert plan.linear_flops == 2 * N * D * E
    elements = N * D + N * E + U * K + (0 if weight is None else D * E) + D * E * K
    assert plan.bytes == elements * x.dtype.itemsize
    assert min(plan.strip, plan.group) >= 1
    assert str(plan).startswith(plan.strategy)


@bounded
@given(cases(per_token=False, indexed=True, least=1), seeds)
def test_the_plan_counts_the_contexts_in_use(case, seed):
    plan = outputs(make_inputs(case, seed=seed), ctxkern.explain)
    lengths = case.lengths or (1,) * case.B
    assert plan.contexts == len({u for u, n in zip(case.index, lengths, strict=True) if n})

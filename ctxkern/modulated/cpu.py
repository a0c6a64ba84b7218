"""C++ kernels on the CPU (csrc/cpu): panel and outer over 32-bit words, the instruction set chosen at run time.

Here pointers, sizes and strides are gathered into the tuples that csrc/module.cpp reads; memory is torch's.
"""

from functools import cache

import torch

from ctxkern import plan as planner
from ctxkern.modulated.shared import check_values, contiguous, outputs
from ctxkern.runtime import cpu as cpu_runtime

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = (0, 0, 0, 0)
_NO_BILINEAR = (0, 0, 0, 0, 0)


def _matrix(t):
    return _ABSENT if t is None else (t.data_ptr(), _CODES[t.dtype], *t.stride())


def _bilinear(t):
    return _NO_BILINEAR if t is None else (t.data_ptr(), _CODES[t.dtype], *t.stride())


def _pointer(t):
    return 0 if t is None else t.data_ptr()


def _projection(weight, bilinear, bias, rows, dweight=None, dbilinear=None):
    tail = (0, 0) if bias is None else (bias.data_ptr(), _CODES[bias.dtype])
    return (
        bilinear.shape[1],
        *_matrix(weight),
        *_bilinear(bilinear),
        *tail,
        _pointer(rows),
        *_matrix(dweight),
        *_bilinear(dbilinear),
    )


def _sizes(x, context, context_index, cu_seqlens, budget, dx=None, dcontext=None):
    """Contexts by token are a table of N rows, one for each row of x."""
    d_in, context_dim = x.shape[-1], context.shape[-1]
    tokens = x.shape[:-1].numel()
    if context.dim() == 3:
        table, sequences, length = tokens, tokens, 1
    else:
        table = context.shape[0]
        sequences, length = (x.shape[0], x.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    return (
        tokens,
        d_in,
        context_dim,
        table,
        _CODES[x.dtype],
        x.data_ptr(),
        context.data_ptr(),
        _CODES[context.dtype],
        context_dim,
        1,
        _pointer(dx),
        _pointer(dcontext),
        torch.get_num_threads(),
        budget,
        sequences,
        length,
        _pointer(cu_seqlens),
        _pointer(context_index),
    )


def _allocator(kept):
    def allocate(size):
        block = torch.empty(size, dtype=torch.uint8)
        kept.append(block)
        return block.data_ptr()

    return allocate


# a context per token: outer, whatever it costs
_OUTER = (0.0, 1.0, -1.0)


@cache
def _has_pairs():
    """Whether words are pairs of bfloat16: where the instruction set multiplies them."""
    return cpu_runtime.cpu_isa() in ("avx512_bf16", "amx_bf16")


def _terms(x, context, bilinears, backward):
    if context.dim() == 3:
        return _OUTER
    largest = max(t.numel() * t.element_size() for t in bilinears)
    return planner.cpu_outer_terms(x.dtype is torch.bfloat16 and _has_pairs(), backward, largest)


def _run(sizes, projections, backward, terms, x, context, context_index, cu_seqlens):
    kept = []
    try:
        cpu_runtime.load().modulated(sizes, projections, backward, terms, _allocator(kept))
    except ValueError:
        check_values(x, context, context_index, cu_seqlens)
        raise


def plan_call(x, context, weight, bilinear, context_index, cu_seqlens, workspace_bytes, backend, backward):
    """The plan of one projection."""
    check_values(x, context, context_index, cu_seqlens)
    sizes = _sizes(x, context, context_index, cu_seqlens, workspace_bytes, x, context)
    weights = (weight, bilinear) if backward else (None, None)
    projections = (_projection(weight, bilinear, None, None, *weights),)
    terms = _terms(x, context, [bilinear], backward)
    tiles = cpu_runtime.load().modulated_tiles(sizes, projections, backward, terms)
    d_in, d_out, context_dim = bilinear.shape
    problem = planner.Problem(
        x.shape[:-1].numel(),
        tiles["contexts"],
        d_in,
        d_out,
        context_dim,
        x.dtype,
        torch.promote_types(bilinear.dtype, context.dtype),
        "cpu",
        context.dim() == 3,
        weight is not None,
    )
    strategy = "outer" if tiles["outer"] else "panel"
    flops, moved = planner.counts(problem, strategy)
    return planner.Plan(
        strategy,
        backend,
        *problem[:5],
        tiles["strip"],
        tiles["group"],
        flops,
        moved,
        tiles["weights_bytes"],
        2 * problem.tokens * d_in * d_out,
        *planner.floor(problem, flops, moved),
        "D" if backward else "E",
        tiles["contexts"] if strategy == "panel" else 0,
    )


def modulated_forward(x, context, weights, bilinears, biases, context_index, cu_seqlens, workspace_bytes):
    """[y], one a projection, in the dtype of x and the leading shape of x."""
    x, context, index, bounds = map(contiguous, (x, context, context_index, cu_seqlens))
    biases = [contiguous(bias) for bias in biases]
    outs = outputs(x, bilinears)
    sizes = _sizes(x, context, index, bounds, workspace_bytes)
    projections = tuple(map(_projection, weights, bilinears, biases, outs))
    _run(sizes, projections, False, _terms(x, context, bilinears, False), x, context, index, bounds)
    return outs


def modulated_backward(douts, x, context, weights, bilinears, context_index, cu_seqlens, workspace_bytes, needs):
    """(dx, dcontext, dweights, dbilinears, dbiases), None where `needs` (the same five, flat) asks for none."""
    x, context, index, bounds = map(contiguous, (x, context, context_index, cu_seqlens))
    douts = [contiguous(dout) for dout in douts]
    n = len(bilinears)
    need_x, need_context, *each = needs
    need_w, need_t, need_b = each[:n], each[n : 2 * n], each[2 * n :]
    dx = torch.empty_like(x) if need_x else None
    dcontext = torch.empty_like(context) if need_context else None
    dweights = [torch.empty_like(w) if need else None for w, need in zip(weights, need_w, strict=True)]
    dbilinears = [torch.empty_like(t) if need else None for t, need in zip(bilinears, need_t, strict=True)]
    leading = tuple(range(x.dim() - 1))
    dbiases = [dout.sum(leading) if need else None for dout, need in zip(douts, need_b, strict=True)]
    if need_x or need_context or any(need_w) or any(need_t):
        sizes = _sizes(x, context, index, bounds, workspace_bytes, dx, dcontext)
        projections = tuple(map(_projection, weights, bilinears, [None] * n, douts, dweights, dbilinears))
        _run(sizes, projections, True, _terms(x, context, bilinears, True), x, context, index, bounds)
    return dx, dcontext, dweights, dbilinears, dbiases

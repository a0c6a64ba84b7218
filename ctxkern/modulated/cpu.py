"""C++ kernels on the CPU (csrc/cpu): panel and outer over 32-bit words, the instruction set chosen at run time.

Here pointers, sizes and strides are gathered into the tuples that csrc/module.cpp reads; memory is torch's.
"""

from functools import cache

import torch

from ctxkern.dtypes import CODES as _CODES
from ctxkern.modulated.operands import Gradients, check_values, contiguous, new_outputs
from ctxkern.modulated.plan import Problem, cpu_terms, describe, outer_above
from ctxkern.runtime import cpu as cpu_runtime

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
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
        kept.append(block)
        return block.data_ptr()

    return allocate


@cache
def _has_pairs():
    """Whether words are pairs of bfloat16: where the instruction set multiplies them."""
    return cpu_runtime.cpu_isa() in ("avx512_bf16", "amx_bf16")


def _outer_above(operands, backward):
    tokens = operands.x.shape[:-1].numel()
    largest = max(t.numel() * t.element_size() for t in operands.bilinears)
    pairs = operands.x.dtype is torch.bfloat16 and _has_pairs()
    return outer_above(cpu_terms(pairs, backward, largest), tokens, operands.per_token)


def _run(sizes, projections, backward, operands):
    kept = []
    try:
        above = _outer_above(operands, backward)
        cpu_runtime.load().modulated(sizes, projections, backward, above, _allocator(kept))
    except ValueError:
        check_values(operands)
        raise


def plan(operands, workspace_bytes, backward):
    """The plan of one projection."""
    check_values(operands)
    x, context, (weight,), (bilinear,), _, context_index, cu_seqlens = operands
    sizes = _sizes(x, context, context_index, cu_seqlens, workspace_bytes, x, context)
    weights = (weight, bilinear) if backward else (None, None)
    projections = (_projection(weight, bilinear, None, None, *weights),)
    tiles = cpu_runtime.load().modulated_tiles(sizes, projections, backward, _outer_above(operands, backward))
    d_in, d_out, context_dim = bilinear.shape
    problem = Problem(
        x.shape[:-1].numel(),
        tiles["contexts"],
        d_in,
        d_out,
        context_dim,
        x.dtype,
        operands.param_dtype,
        "cpu",
        operands.per_token,
        weight is not None,
    )
    return describe(
        problem,
        strategy="outer" if tiles["outer"] else "panel",
        backend="cpu",
        strip=tiles["strip"],
        group=tiles["group"],
        workspace_bytes=tiles["weights_bytes"],
        strip_of="D" if backward else "E",
    )


def _contiguous(operands):
    x, context, weights, bilinears, biases, index, bounds = operands
    x, context, index, bounds = map(contiguous, (x, context, index, bounds))
    return operands._replace(
        x=x, context=context, biases=[*map(contiguous, biases)], context_index=index, cu_seqlens=bounds
    )


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    operands = _contiguous(operands)
    x, context, weights, bilinears, biases, index, bounds = operands
    outs = new_outputs(operands)
    sizes = _sizes(x, context, index, bounds, workspace_bytes)
    _run(sizes, tuple(map(_projection, weights, bilinears, biases, outs)), False, operands)
    return outs


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    operands = _contiguous(operands)
    x, context, weights, bilinears, _, index, bounds = operands
    douts = [contiguous(dout) for dout in douts]
    dx = torch.empty_like(x) if needs.x else None
    dcontext = torch.empty_like(context) if needs.context else None
    dweights = [torch.empty_like(w) if need else None for w, need in zip(weights, needs.weights, strict=True)]
    dbilinears = [torch.empty_like(t) if need else None for t, need in zip(bilinears, needs.bilinears, strict=True)]
    leading = tuple(range(x.dim() - 1))
    dbiases = [dout.sum(leading) if need else None for dout, need in zip(douts, needs.biases, strict=True)]
    grads = Gradients(dx, dcontext, dweights, dbilinears, dbiases)
    if grads.from_kernels():
        sizes = _sizes(x, context, index, bounds, workspace_bytes, dx, dcontext)
        absent = [None] * len(douts)
        _run(sizes, tuple(map(_projection, weights, bilinears, absent, douts, dweights, dbilinears)), True, operands)
    return grads

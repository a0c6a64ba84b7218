"""Outer, launched: how rows, columns and sums are cut; the maths is in outer_kernels.py."""

import torch
import triton

from . import outer_kernels as kernels
from .call import TL_DTYPES, as_matrix, contiguous, strides
from .tiles import clip, splits, tile


def forward(call, weights, bilinears, biases, outs):
    """y of each projection into `outs`."""
    for weight, bilinear, bias, out in zip(weights, bilinears, biases, outs, strict=True):
        if out.numel():
            _forward(call, weight, bilinear, contiguous(bias), out)


def _forward(call, weight, bilinear, bias, out):
    d_out, k = bilinear.shape[1], call.context_dim
    t = tile("outer", *call.target, call.tokens, d_out, k)
    tiles = triton.cdiv(d_out, t.columns) * triton.cdiv(call.tokens, t.rows)
    parts = splits(call.d_in, tiles, 4 * out.numel(), call.budget)
    step = 16 * triton.cdiv(call.d_in, 16 * parts)  # so that rows are read from multiples of 16 bytes on
    parts = triton.cdiv(call.d_in, step)
    sums = call.buffer(parts * out.numel(), torch.float32) if parts > 1 else out
    kernels._outer_forward_kernel[(tiles, parts)](
        *(call.x, call.context, call.slot, weight, bilinear, bias, sums),
        *(*bilinear.stride(), *strides(weight, 2)),
        *(call.tokens, call.d_in, d_out, k, step),
        BLOCK_M=t.rows,
        BLOCK_E=t.columns,
        BLOCK_K=t.depth,
        BLOCK_D=clip(step, 64),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SLOTS=call.slot is not None,
        SPLIT=parts > 1,
        DTYPE=TL_DTYPES[call.dtype],
        PRECISION=call.precision,
        **t.launch(),
    )
    if parts > 1:
        block = 1024
        kernels._outer_sum_kernel[(triton.cdiv(out.numel(), block),)](
            sums, bias, out, out.numel(), d_out, parts, BLOCK=block, HAS_BIAS=bias is not None
        )


def backward(call, douts, weights, bilinears, dx, dcontext, dweights, dbilinears):
    """The gradients into tensors of theirs; None: not asked for."""
    douts = [as_matrix(d) for d in douts]
    for dout, dweight, dbilinear in zip(douts, dweights, dbilinears, strict=True):
        if dweight is not None:
            _product(call, call.x.t(), dout, dweight, False)
        if dbilinear is not None and dbilinear.numel():
            _spread(call, dout, dbilinear)
    if dx is not None or dcontext is not None:
        _turn(call, douts, weights, bilinears, None if dx is None else as_matrix(dx), dcontext)


def _product(call, a, b, out, add):
    (m, k), n = a.shape, b.shape[1]
    t = tile("product", *call.target, m, n, k)
    if m and n:
        kernels._product_kernel[(triton.cdiv(m, t.rows), triton.cdiv(n, t.columns))](
            *(a, b, out),
            *(*a.stride(), *b.stride(), *out.stride()),
            *(m, n, k),
            BLOCK_M=t.rows,
            BLOCK_N=t.columns,
            BLOCK_K=t.depth,
            ADD=add,
            DTYPE=TL_DTYPES[call.dtype],
            PRECISION=call.precision,
            **t.launch(),
        )


def _spread(call, dout, dbilinear):
    d_out, k = dout.shape[1], call.context_dim
    t = tile("outer-spread", *call.target, d_out, k, call.tokens)
    kernels._outer_spread_kernel[(call.d_in * triton.cdiv(d_out, t.rows), triton.cdiv(k, t.columns))](
        *(call.x, dout, call.context, call.slot, dbilinear),
        *dbilinear.stride(),
        *(call.tokens, call.d_in, d_out, k),
        BLOCK_M=t.depth,
        BLOCK_E=t.rows,
        BLOCK_K=t.columns,
        SLOTS=call.slot is not None,
        PRECISION=call.wide_precision,
        **t.launch(),
    )


def _turn(call, douts, weights, bilinears, dx, dcontext):
    k = call.context_dim
    t = tile("outer-turn", *call.target, call.tokens, k, max(b.shape[1] for b in bilinears))
    tiles = triton.cdiv(call.tokens, t.rows)
    # without contexts dx is weight's part alone, which the kernel still writes
    pieces = [(i, at) for i in range(len(bilinears)) for at in range(0, max(k, 1), t.columns)]
    weighted = dx is not None and any(w is not None for w in weights)
    sums = None
    if weighted or dx is not None and len(pieces) > 1:
        sums = call.buffer((call.tokens, call.d_in), torch.float32)
    started = False
    for dout, weight in zip(douts, weights, strict=True):
        if weighted and weight is not None:
            _product(call, dout, weight.t(), sums, started)
            started = True
    parts, partial = splits(call.d_in, tiles, 4 * call.tokens * k, call.budget), None
    step = 16 * triton.cdiv(call.d_in, 16 * parts)
    parts = triton.cdiv(call.d_in, step)
    if dcontext is not None:
        partial = call.buffer(parts * call.tokens * k, torch.float32)
    for piece, (i, k_begin) in enumerate(pieces):
        kernels._outer_turn_kernel[(tiles, parts)](
            *(call.x, douts[i], call.context, call.slot, bilinears[i], sums, dx, partial),
            *bilinears[i].stride(),
            *(call.tokens, call.d_in, bilinears[i].shape[1], k, k_begin, step),
            BLOCK_M=t.rows,
            BLOCK_E=t.depth,
            BLOCK_K=t.columns,
            DX=dx is not None,
            DCONTEXT=dcontext is not None,
            STARTED=started,
            LAST=piece + 1 == len(pieces),
            ADDED=i > 0,
            SLOTS=call.slot is not None,
            PRECISION=call.precision,
            **t.launch(),
        )
        started = True
    if dcontext is not None and k:
        groups, block_k = call.groups, clip(k, 128)
        kernels._outer_dcontext_kernel[(groups.limit, triton.cdiv(k, block_k))](
            *(partial, groups.buffer, dcontext),
            *(*groups.arguments()[1:], call.tokens, k, parts),
            BLOCK_M=16,
            BLOCK_K=block_k,
            UNIFORM=groups.uniform,
            ORDERED=groups.ordered,
        )

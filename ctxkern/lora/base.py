"""The product of a low-rank layer with its base weight, and its gradients: by torch's library, or by a backend's own
product where that takes less time.

own(dy [N, E], weight [E, D] of any strides) → dy weight; own(x [N, D], weight, bias, turned=True) → x weight^T + bias;
None where the library's is to run.
"""

from functools import cache

import torch

from ctxkern.dtypes import accumulator
from ctxkern.plan import compute_dtype, forced
from ctxkern.runtime import cpu

# Rows, and columns, from which products of the C++ kernels take less time than torch's on an AMD processor with
# AVX-512: in float32 than MKL's, in bfloat16 than oneDNN's where they go along with the update (bench/LOG.md). By
# themselves they share columns among threads, and need as many for each; along with the update they share rows, so that
# the number of threads does not count: it would change how y is rounded.
_LEAST_ROWS, _LEAST_COLUMNS = 256, 64


def own_on_cpu(rows, columns, *dtypes):
    """(whether the backend cpu takes its own product, of so many rows and columns and tensors of these dtypes; whether
    it takes one that goes along with the update, if the rows of adapters allow it)"""
    library, each = forced.library, dtypes[0]
    few = rows < _LEAST_ROWS or columns < _LEAST_COLUMNS
    if (few or not _is_measured()) if library is None else library:
        return False, False
    if dtypes != (each,) * len(dtypes):
        return False, False
    if each is torch.float32:
        return library is False or columns >= _LEAST_COLUMNS * torch.get_num_threads(), True
    return False, each is torch.bfloat16 and cpu.cpu_isa() in ("avx512_bf16", "amx_bf16")


@cache
def _is_measured():
    return cpu.cpu_isa().startswith("avx512") and "AMD" in cpu.cpu_name() and torch.backends.mkl.is_available()


def strips_of_weight(weight, dim, compute, workspace_bytes):
    """Slices of a dimension of weight [E, D]: one, or as many as keep a cast copy within the workspace."""
    size, other = weight.shape[dim], weight.shape[1 - dim]
    step = size if weight.dtype == compute else workspace_bytes // max(1, other * compute.itemsize)
    return [slice(i, i + step) for step in (max(1, step),) for i in range(0, size, step)]


def base_product(x, weight, bias, workspace_bytes, own=None):
    """x [N, D] weight^T + bias as [N, E] in the dtype of x."""
    y = own and own(x, weight, bias, turned=True)
    if y is not None:
        return y
    compute = compute_dtype(x.device.type, x.dtype)
    if weight.dtype == x.dtype == compute and (bias is None or bias.dtype == compute):
        return torch.nn.functional.linear(x, weight, bias)
    wide = x.to(compute)
    y = wide.new_empty(len(x), weight.shape[0])
    for strip in strips_of_weight(weight, 0, compute, workspace_bytes):
        y[:, strip] = wide @ weight[strip].to(compute).mT
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _input_gradient(dy, weight, workspace_bytes):
    """dy weight [N, D] in the dtype of dy."""
    if weight.dtype == dy.dtype:
        return dy @ weight
    dx = dy.new_empty(len(dy), weight.shape[1])
    for strip in strips_of_weight(weight, 1, dy.dtype, workspace_bytes):
        torch.mm(dy, weight[:, strip].to(dy.dtype), out=dx[:, strip])
    return dx


def _weight_gradient(x, dy, weight, workspace_bytes):
    """dy^T x [E, D] in the dtype and the layout of weight, which saves turning it where that is [D, E] in memory."""
    turned = weight.mT.is_contiguous()
    if weight.dtype == x.dtype:
        return (x.mT @ dy).mT if turned else dy.mT @ x
    dweight = torch.empty_like(weight)
    for strip in strips_of_weight(weight, 0, x.dtype, workspace_bytes):
        if turned:
            dweight.mT[:, strip] = x.mT @ dy[:, strip]
        else:
            dweight[strip] = dy[:, strip].mT @ x
    return dweight


def base_gradients(x, dy, weight, bias, needs, workspace_bytes, own=None):
    """(dx, dweight, dbias) of it for x [N, D] and dy [N, E]; None where they are not asked for, or without weight."""
    compute = compute_dtype(x.device.type, x.dtype)
    dx = dweight = dbias = None
    wide = dy.to(compute)
    if needs.x and weight is not None:
        dx = own and own(dy, weight)
        if dx is None:
            dx = _input_gradient(wide, weight, workspace_bytes).to(x.dtype)
    if needs.weight:
        dweight = _weight_gradient(x.to(compute), wide, weight, workspace_bytes)
    if needs.bias:
        dbias = dy.sum(0, dtype=accumulator(dy.dtype)).to(bias.dtype)
    return dx, dweight, dbias

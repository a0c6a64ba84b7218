"""CUDA C++ kernels (csrc/cuda): panel and outer on warp-level matrix instructions, in a library without torch.

Memory and stream are torch's. The first of two passes counts the workspace, the second launches.
"""

import ctypes
from contextlib import nullcontext

import torch

from ctxkern.modulated.native import problem_of, without_gaps
from ctxkern.modulated.operands import (
    Gradients,
    check_values,
    contiguous,
    fill_with_biases,
    new_gradients,
    new_outputs,
)
from ctxkern.modulated.plan import Problem, describe, gpu_terms, outer_above
from ctxkern.plan import rounds_to_tf32
from ctxkern.runtime import cuda as cuda_runtime

# a workspace begins at a multiple of it
_ALIGNED = 256


def _problem(operands, rows, workspace_bytes, grads=None):
    x = operands.x
    return problem_of(
        operands,
        rows,
        outer_above=outer_above(gpu_terms(), x.shape[:-1].numel(), operands.per_token),
        workspace_bytes=workspace_bytes,
        grads=grads,
        tf32=rounds_to_tf32(x.dtype),
    )


def _run(problem, backward, operands):
    """Launches on the stream in use, in a workspace of torch's.

    Raises RuntimeError with the operator, its shapes and the cause; torch.OutOfMemoryError.
    """
    device, size = operands.x.device, ctypes.c_int64(0)
    run = cuda_runtime.load().ctxkern_cuda_modulated
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        address = workspace = None
        for launches in (False, True):
            if launches:
                workspace = _workspace(size.value, backward, operands)
                address = -(-workspace.data_ptr() // _ALIGNED) * _ALIGNED
            error = run(problem, backward, device.index or 0, address, size, stream)
            if error:
                raise RuntimeError(f"{_described(backward, operands)} failed: {error.decode()}")


def _workspace(size, backward, operands):
    try:
        return torch.empty(size + _ALIGNED, dtype=torch.uint8, device=operands.x.device)
    except torch.OutOfMemoryError as error:
        what = f"{_described(backward, operands)} has no memory for its workspace of {size} bytes"
        raise torch.OutOfMemoryError(f"{what}: {error}") from error


def _described(backward, operands):
    name, x = "modulated_backward" if backward else "modulated_forward", operands.x
    return f"{name} on backend 'cuda' (x {list(x.shape)} {x.dtype}, context {list(operands.context.shape)})"


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    check_values(operands)
    operands = without_gaps(operands)
    outs = new_outputs(operands)
    if operands.x.numel():
        _run(_problem(operands, outs, workspace_bytes), False, operands)
    else:
        fill_with_biases(outs, operands.biases)
    return outs


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    operands, douts = without_gaps(operands), [contiguous(dout) for dout in douts]
    grads = new_gradients(douts, operands, needs)
    if not grads.from_kernels():
        return grads
    if operands.x.numel() and any(t.shape[1] for t in operands.bilinears):
        _run(_problem(operands, douts, workspace_bytes, grads), True, operands)
    else:
        for grad in grads.from_kernels():
            grad.zero_()
    return grads


def plan(operands, workspace_bytes, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    x, (weight,), (bilinear,) = operands.x, operands.weights, operands.bilinears
    grads = Gradients(x, operands.context, [weight], [bilinear], [None]) if backward else None
    # x stands for y, which is not touched
    given, tiles = _problem(operands, [x], workspace_bytes, grads), (ctypes.c_int64 * 5)()
    cuda_runtime.load().ctxkern_cuda_modulated_tiles(given, backward, tiles)
    outer, contexts, rows, columns, group = tiles
    d_in, d_out, context_dim = bilinear.shape
    tokens = x.shape[:-1].numel()
    return describe(
        Problem(
            tokens=tokens,
            contexts=contexts,
            d_in=d_in,
            d_out=d_out,
            context_dim=context_dim,
            dtype=x.dtype,
            param_dtype=operands.param_dtype,
            device_type="cuda",
            per_token=operands.per_token,
            has_weight=weight is not None,
        ),
        strategy="outer" if outer else "panel",
        backend="cuda",
        strip=d_out if outer else rows if backward else columns,
        group=tokens if outer else group,
        workspace_bytes=0 if outer else rows * columns * group * x.element_size(),
        strip_of="D" if backward else "E",
    )

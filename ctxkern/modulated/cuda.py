"""CUDA C++ kernels (csrc/cuda): panel and outer on warp-level matrix instructions, in a library without torch.

Memory and stream are torch's. The first of two passes counts the workspace, the second launches.
"""

import ctypes

from ctxkern.modulated.native import MOST_BYTES, without_gaps
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
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import cuda as cuda_runtime
from ctxkern.runtime import problem as structs


def _problem(operands, rows, workspace_bytes, grads=None):
    x, problem = operands.x, structs.Problem()
    above = outer_above(gpu_terms(), x.shape[:-1].numel(), operands.per_token)
    workspace_bytes = min(workspace_bytes, MOST_BYTES)
    cpu_runtime.load().fill_modulated(ctypes.addressof(problem), operands, rows, grads, above, workspace_bytes)
    problem.tf32 = rounds_to_tf32(x.dtype)
    return problem


def _run(problem, backward, operands):
    name, x = "modulated_backward" if backward else "modulated_forward", operands.x
    what = f"{name} on backend 'cuda' (x {list(x.shape)} {x.dtype}, context {list(operands.context.shape)})"
    cuda_runtime.run(cuda_runtime.load().ctxkern_cuda_modulated, problem, backward, x.device, what)


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

"""C++ kernels on the CPU (csrc/cpu): panel and outer over 32-bit words, the instruction set chosen at run time."""

import torch

from ctxkern.modulated.native import MOST_BYTES, without_gaps
from ctxkern.modulated.operands import Gradients, check_values, contiguous
from ctxkern.modulated.plan import Problem, cpu_terms, describe
from ctxkern.plan import forced
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import memory


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    run = cpu_runtime.load().modulated_forward
    terms, most = cpu_terms(False, forced.strategy), min(workspace_bytes, MOST_BYTES)
    limits = terms, most, torch.get_num_threads(), memory.workspace
    try:
        outs = run(operands, *limits)
        return run(without_gaps(operands), *limits) if outs is None else outs
    except ValueError:
        check_values(operands)
        raise


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    run = cpu_runtime.load().modulated_backward
    terms, most = cpu_terms(True, forced.strategy), min(workspace_bytes, MOST_BYTES)
    options = needs, memory.empty_like, terms, most, torch.get_num_threads(), memory.workspace
    try:
        grads = run(douts, operands, *options)
        if grads is None:
            grads = run([contiguous(dout) for dout in douts], without_gaps(operands), *options)
        return Gradients(*grads)
    except ValueError:
        check_values(operands)
        raise


def plan(operands, workspace_bytes, backward):
    """The plan of one projection."""
    check_values(operands)
    operands = without_gaps(operands)
    x, (weight,), (bilinear,) = operands.x, operands.weights, operands.bilinears
    grads = Gradients(x, operands.context, [weight], [bilinear], [None]) if backward else None
    # x stands for y, which is not touched
    tiles = cpu_runtime.load().modulated_tiles(
        operands,
        [x],
        grads,
        cpu_terms(backward, forced.strategy),
        min(workspace_bytes, MOST_BYTES),
        torch.get_num_threads(),
    )
    d_in, d_out, context_dim = bilinear.shape
    return describe(
        Problem(
            tokens=x.shape[:-1].numel(),
            contexts=tiles["contexts"],
            d_in=d_in,
            d_out=d_out,
            context_dim=context_dim,
            dtype=x.dtype,
            param_dtype=operands.param_dtype,
            device_type="cpu",
            per_token=operands.per_token,
            has_weight=weight is not None,
        ),
        strategy="outer" if tiles["outer"] else "panel",
        backend="cpu",
        strip=tiles["strip"],
        group=tiles["group"],
        workspace_bytes=tiles["workspace_bytes"],
        strip_of="D" if backward else "E",
    )

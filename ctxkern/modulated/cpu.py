"""C++ kernels on the CPU (csrc/cpu): panel and outer over 32-bit words, the instruction set chosen at run time."""

from operator import attrgetter

import torch

from ctxkern.modulated.native import MOST_BYTES, without_gaps
from ctxkern.modulated.operands import Gradients, check_values, contiguous, new_gradients, new_outputs
from ctxkern.modulated.plan import Problem, cpu_outer_above, describe
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import memory

# instruction sets that multiply pairs of bfloat16
_PAIRS = ("avx512_bf16", "amx_bf16")

_nbytes = attrgetter("nbytes")


def _call(operands, rows, grads, workspace_bytes):
    """What `_C` takes for a call. rows: y of each projection, or dy where `grads` says which gradients to write."""
    x = operands.x
    tokens = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    largest = max(map(_nbytes, operands.bilinears))
    pairs = x.dtype is torch.bfloat16 and cpu_runtime.load().cpu_isa() in _PAIRS
    above = cpu_outer_above(pairs, grads is not None, largest, tokens, operands.context.dim() == 3)
    return operands, rows, grads, above, min(workspace_bytes, MOST_BYTES), torch.get_num_threads()


def _allocate(size):
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _run(operands, rows, grads, workspace_bytes):
    try:
        cpu_runtime.load().modulated(*_call(operands, rows, grads, workspace_bytes), _allocate)
    except ValueError:
        check_values(operands)
        raise


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    operands = without_gaps(operands)
    outs = new_outputs(operands)
    _run(operands, outs, None, workspace_bytes)
    return outs


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    operands, douts = without_gaps(operands), [contiguous(dout) for dout in douts]
    grads = new_gradients(douts, operands, needs, memory.empty_like)
    if needs.x or needs.context or any(needs.weights) or any(needs.bilinears):
        _run(operands, douts, grads, workspace_bytes)
    return grads


def plan(operands, workspace_bytes, backward):
    """The plan of one projection."""
    check_values(operands)
    operands = without_gaps(operands)
    x, (weight,), (bilinear,) = operands.x, operands.weights, operands.bilinears
    grads = Gradients(x, operands.context, [weight], [bilinear], [None]) if backward else None
    # x stands for y, which is not touched
    tiles = cpu_runtime.load().modulated_tiles(*_call(operands, [x], grads, workspace_bytes))
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

"""C++ kernels on the CPU: those of the low-rank family (csrc/cpu/lora) with gates, which have kernels too."""

from functools import partial

import torch

from ctxkern.lora import cpu
from ctxkern.modulated.operands import contiguous
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import memory

from .operands import check_values, context_gradients, gates, lora_backward, lora_forward

# Multiplications of the gates from which torch's products take less time (bench/LOG.md).
_MANY = 1 << 21


def _by_torch(operands):
    """Whether torch makes the gates: of many contexts, all of which may be in use."""
    rows, index = operands.context.shape[:-1].numel(), operands.context_index
    return rows * operands.context_factor.numel() > _MANY and (index is None or len(index) >= rows)


def _without_gaps(operands):
    context, index, bounds = map(contiguous, (operands.context, operands.context_index, operands.cu_seqlens))
    return operands._replace(context=context, context_index=index, cu_seqlens=bounds)


def _gates(operands):
    """As `gates` of .operands, of the contexts in use."""
    if _by_torch(operands):
        return gates(operands)
    context, rank = operands.context, operands.out_factor.shape[0]
    values = torch.empty((context.shape[:-1].numel(), rank), dtype=torch.float32, device="cpu")
    try:
        cpu_runtime.load().gates(_without_gaps(operands), values, torch.get_num_threads(), memory.workspace)
    except ValueError:
        check_values(operands)
        raise
    return values


def _context_gradients(products, operands, needs):
    """As `context_gradients` of .operands."""
    if _by_torch(operands):
        return context_gradients(products, operands, needs)
    asked = needs.context, needs.context_factor
    return cpu_runtime.load().gate_gradients(
        _without_gaps(operands), products, *asked, torch.get_num_threads(), memory.workspace
    )


forward = partial(lora_forward, cpu, gates=_gates, together=True)
backward = partial(lora_backward, cpu, gates=_gates, context_gradients=_context_gradients, together=True)

"""C++ kernels on the CPU: those of the low-rank family (csrc/cpu/lora) with gates, which have kernels too."""

from functools import partial

import torch

from ctxkern.lora import cpu
from ctxkern.runtime import cpu as cpu_runtime

from .operands import lora_backward, lora_forward


def _allocate(size):
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _without_gaps(operands):
    for t in (operands.context, operands.context_index, operands.cu_seqlens):
        if t is not None and not t.is_contiguous():
            dense = {name: getattr(operands, name) for name in ("context", "context_index", "cu_seqlens")}
            return operands._replace(**{name: t if t is None else t.contiguous() for name, t in dense.items()})
    return operands


def _gates(operands):
    """As `gates` of .operands, of the contexts in use."""
    context, rank = operands.context, operands.out_factor.shape[0]
    values = torch.empty((context.shape[:-1].numel(), rank), dtype=torch.float32, device="cpu")
    cpu_runtime.load().gates(_without_gaps(operands), values, torch.get_num_threads(), _allocate)
    return values


def _context_gradients(products, operands, needs):
    """As `context_gradients` of .operands."""
    asked = needs.context, needs.context_factor
    return cpu_runtime.load().gate_gradients(
        _without_gaps(operands), products, *asked, torch.get_num_threads(), _allocate
    )


forward = partial(lora_forward, cpu, gates=_gates, together=True)
backward = partial(lora_backward, cpu, gates=_gates, context_gradients=_context_gradients, together=True)

"""C++ kernels on the CPU (csrc/cpu/lora) around torch's own product with the base weight."""

import torch

from ctxkern.lora import native
from ctxkern.lora.operands import check_values
from ctxkern.runtime import cpu as cpu_runtime


def _allocate(size):
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _run(operands, *call):
    try:
        cpu_runtime.load().lora(operands, *call, torch.get_num_threads(), _allocate)
    except ValueError:
        check_values(operands)
        raise


def forward(operands, options, gates=None):
    """y in the dtype of x and the leading shape of x."""
    return native.forward(operands, options, gates, _run)


def backward(dout, operands, options, needs, gates=None):
    """The `Gradients` that `needs` asks for."""
    return native.backward(dout, operands, options, needs, gates, _run)

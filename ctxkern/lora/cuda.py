"""CUDA C++ kernels (csrc/cuda/lora) around torch's own product with the base weight."""

from ctxkern.lora import native
from ctxkern.lora.operands import check_values
from ctxkern.plan import rounds_to_tf32
from ctxkern.runtime import cuda as cuda_runtime


def _run(problem, backward, operands):
    x = operands.x
    if not x.shape[:-1].numel() and not backward:
        return
    problem.tf32 = rounds_to_tf32(x.dtype)
    name = "lora_backward" if backward else "lora_forward"
    what = f"{name} on backend 'cuda' (x {list(x.shape)} {x.dtype}, A {list(operands.A.shape)})"
    cuda_runtime.run(cuda_runtime.load().ctxkern_cuda_lora, problem, backward, x.device, what)


def forward(operands, options, gates=None):
    """y in the dtype of x and the leading shape of x."""
    check_values(operands)
    return native.forward(operands, options, gates, _run)


def backward(dout, operands, options, needs, gates=None):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    return native.backward(dout, operands, options, needs, gates, _run)

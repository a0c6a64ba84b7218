"""CUDA C++ kernels (csrc/cuda/lora) around torch's own product with the base weight."""

from ctypes import addressof

from ctxkern.lora import native
from ctxkern.lora.operands import check_values
from ctxkern.plan import rounds_to_tf32
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import cuda as cuda_runtime
from ctxkern.runtime.problem import LoraProblem


def _problem(operands, *call):
    problem = LoraProblem()
    cpu_runtime.load().fill_lora(addressof(problem), operands, *call)
    problem.tf32 = rounds_to_tf32(operands.x.dtype)
    return problem


def _run(operands, rows, gradients, *call):
    x, backward = operands.x, gradients is not None
    if not x.shape[:-1].numel() and not backward:
        return
    problem = _problem(operands, rows, gradients, *call)
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

"""C++ kernels on the CPU (csrc/cpu/lora) around the product with the base weight: torch's own, or where it takes less
time one that goes along with them, or that of the modulated kernels (csrc/cpu/modulated)."""

import torch

from ctxkern.lora import native
from ctxkern.lora.base import base_gradients, own_on_cpu
from ctxkern.lora.operands import Gradients, check_values
from ctxkern.modulated import cpu as modulated
from ctxkern.modulated.operands import Operands
from ctxkern.plan import DEFAULT_WORKSPACE, compute_dtype
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import memory


def _own_product(x, weight, bias=None, turned=False):
    """As `own` of `base`: a modulated projection without a context."""
    columns = weight.shape[0 if turned else 1]
    if not own_on_cpu(len(x), columns, x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype)[0]:
        return None
    weight = weight.mT if turned else weight
    context, bilinear = x.new_empty(1, 0), x.new_empty(*weight.shape, 0)
    (y,) = modulated.forward(Operands(x[None], context, [weight], [bilinear], [bias]), DEFAULT_WORKSPACE)
    return y[0]


def _checked(operands, function, *given):
    try:
        return function(*given, torch.get_num_threads(), memory.workspace)
    except ValueError:
        check_values(operands)
        raise


def _run(operands, *call):
    _checked(operands, cpu_runtime.load().lora, operands, *call)


def _is_short(operands, options):
    """Whether C++ may see to all but the gradients of weight, but for one adapter, and of bias: weight has the dtype of
    x and of torch's product."""
    x = operands.x
    return not options.dropout and operands.weight is not None and compute_dtype("cpu", x.dtype) is x.dtype


def _base(operands, columns):
    """`own_on_cpu` of a base product of so many columns."""
    x = operands.x
    return own_on_cpu(x.shape[:-1].numel(), columns, x.dtype, operands.weight.dtype)


def forward(operands, options, gates=None):
    """y in the dtype of x and the leading shape of x."""
    if _is_short(operands, options):
        given = operands, gates, options.scale, *_base(operands, operands.weight.shape[0])
        y = _checked(operands, cpu_runtime.load().lora_forward, *given)
        if y is not None:
            return y
    return native.forward(operands, options, gates, _run, _own_product)


def backward(dout, operands, options, needs, gates=None):
    """The `Gradients` that `needs` asks for."""
    if _is_short(operands, options):
        given = dout, operands, needs, gates, options.scale, *_base(operands, operands.weight.shape[1])
        grads = _checked(operands, cpu_runtime.load().lora_backward, *given)
        if grads is not None:
            dx, dweight, dA, dB = grads
            dbias, by_torch = None, needs.weight and dweight is None
            if by_torch or needs.bias:
                x, dy, (_, weight, _, _, bias, *_) = operands.x.flatten(0, -2), dout.flatten(0, -2), operands
                left = needs._replace(x=False, weight=by_torch)
                _, made, dbias = base_gradients(x, dy, weight, bias, left, options.workspace_bytes)
                dweight = made if by_torch else dweight
            return Gradients(dx, dweight, dA, dB, dbias)
    return native.backward(dout, operands, options, needs, gates, _run, _own_product)

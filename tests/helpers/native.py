"""What tests of both C++ backends share: calls of a backend's module itself, mixes of dtypes, unreadable tensors."""

import itertools

import torch

from ctxkern.dtypes import name_of
from ctxkern.modulated.operands import Gradients, Operands

WORKSPACE = 32 << 20

_OTHERS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
# dtypes of (x, context, weight, bilinear): every combination that kernels take
MIXES = [(x, *each) for x, others in _OTHERS.items() for each in itertools.product(others, repeat=3)]


def mix_id(mix):
    return "-".join(map(name_of, mix))


def mixed(inputs, mix):
    """Inputs with the dtypes of a mix; those of bias and dy are those of weight and x."""
    x, context, weight, bilinear = mix
    inputs.x, inputs.dy, inputs.context = inputs.x.to(x), inputs.dy.to(x), inputs.context.to(context)
    inputs.weight = None if inputs.weight is None else inputs.weight.to(weight)
    inputs.bias = None if inputs.bias is None else inputs.bias.to(weight)
    inputs.bilinear = inputs.bilinear.to(bilinear)
    return inputs


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, index, bounds, x, context, weight, bilinear, bias):
        ctx.module, ctx.operands = module, Operands(x, context, [weight], [bilinear], [bias], index, bounds)
        return module.forward(ctx.operands, WORKSPACE)[0]

    @staticmethod
    def backward(ctx, dout):
        needs = Gradients.of(ctx.needs_input_grad[3:])
        grads = list(ctx.module.backward([dout], ctx.operands, WORKSPACE, needs).flat())
        if grads[-1] is not None:
            grads[-1] = grads[-1].to(ctx.operands.biases[0].dtype)
        return None, None, None, *grads


def direct(module):
    """`modulated_linear` by a backend's module, past the checks of the public call."""

    def fn(x, context, weight, bilinear, bias=None, *, context_index=None, cu_seqlens=None):
        return _Direct.apply(module, context_index, cu_seqlens, x, context, weight, bilinear, bias)

    return fn


# gradients alone, and what they must not read
UNREAD = {
    "x": ("x",),
    "context": ("weight", "context"),
    "weight": ("context", "weight", "bilinear"),
    "bilinear": ("weight", "bilinear"),
}

# a process that dies where a gradient reads what it does not need; module: name of the backend
UNREAD_CODE = """
import ctypes, importlib, mmap, torch
from ctxkern.dtypes import name_of
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.force import force

libc, kept = ctypes.CDLL(None), []

def unreadable(t):
    size = -(-t.numel() * t.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size)
    kept.append(memory)
    made = torch.frombuffer(memory, dtype=t.dtype, count=t.numel()).view(t.shape)
    assert libc.mprotect(ctypes.c_void_p(made.data_ptr()), ctypes.c_size_t(size), 0) == 0
    return made

module, names = importlib.import_module("ctxkern.modulated.{backend}"), ("x", "context", "weight", "bilinear", "bias")
for strategy in ("panel", "outer"):
    for dtype in (torch.float32, torch.bfloat16):
        made = make_inputs(Case("unread", 5, 3, 33, 24, 7), dtype)
        tensors = dict(x=made.x, context=made.context, weight=made.weight, bilinear=made.bilinear, bias=None)
        for need, unread in {unread!r}.items():
            given = tensors | {{name: unreadable(tensors[name]) for name in unread}}
            needs = Gradients.of([name == need for name in names])
            found = []
            for each in (tensors, given):
                lists = ([each[name]] for name in names[2:])
                with force(strategy=strategy):
                    operands = Operands(each["x"], each["context"], *lists)
                    found.append(module.backward([made.dy], operands, 1 << 20, needs).flat())
            first, second = ([t for t in grads if t is not None] for grads in found)
            assert len(first) == 1 and torch.equal(first[0], second[0]), (strategy, dtype, need)
print("read nothing else")
"""

"""CUDA C++ kernels (csrc/cuda): panel and outer on warp-level matrix instructions, in a library without torch.

Here pointers, sizes and strides are packed into the struct Problem of csrc/cuda/problem.h; memory and stream are
torch's.
"""

import ctypes
import struct
from contextlib import nullcontext

import torch

from ctxkern.dtypes import CODES as _CODES
from ctxkern.modulated.operands import (
    check_values,
    contiguous,
    fill_with_biases,
    new_gradients,
    new_outputs,
    rounds_to_tf32,
)
from ctxkern.modulated.plan import Problem, describe, gpu_terms, outer_above
from ctxkern.runtime import cuda as cuda_runtime

# Problem: 20 integers before its projections, 22 in each, and Groups and slots, which the library fills in
_MOST = 3
_HEAD, _EACH = 20, 22
_PROBLEM = struct.Struct(f"={_HEAD + _MOST * _EACH}q q6i q")


def _pointer(t):
    return 0 if t is None else t.data_ptr()


class _Call:
    """The parts of Problem that both passes share."""

    def __init__(self, operands, budget):
        x, context, _, _, _, context_index, cu_seqlens = operands
        self.x, self.context = contiguous(x), contiguous(context)
        self.index, self.bounds = contiguous(context_index), contiguous(cu_seqlens)
        self.tokens, self.d_in = x.shape[:-1].numel(), x.shape[-1]
        self.context_dim = context.shape[-1]
        self.per_token = context.dim() == 3
        if self.per_token:
            self.table, self.sequences, self.length = self.tokens, self.tokens, 1
        else:
            self.table = context.shape[0]
            self.sequences, self.length = x.shape[:2] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
        self.budget = budget
        self.tf32 = int(rounds_to_tf32(x.dtype))

    @property
    def most_contexts(self):
        return min(self.sequences, self.table)

    @property
    def outer(self):
        return self.most_contexts > outer_above(gpu_terms(), self.tokens, self.per_token)

    def parameter(self, t):
        """Pointer, and whether it is float32 beside a half."""
        if t is None or not t.numel():
            return 0, 0
        return t.data_ptr(), int(t.dtype is not self.x.dtype)

    def strides(self, t, dims):
        return (0,) * dims if t is None else t.stride()

    def projection(self, weight, bilinear, bias, rows, dweight=None, dbilinear=None):
        return (
            *self.parameter(weight),
            *self.parameter(bilinear),
            *self.parameter(bias),
            *self.parameter(dweight),
            *self.parameter(dbilinear),
            rows.data_ptr(),
            bilinear.shape[1],
            *self.strides(weight, 2),
            *bilinear.stride(),
            *self.strides(dweight, 2),
            *self.strides(dbilinear, 3),
        )

    def run(self, projections, backward, dx=None, dcontext=None):
        """Launches on the stream in use, in a workspace of torch's.

        Raises RuntimeError with the operator, its shapes and the cause; torch.OutOfMemoryError.
        """
        head = (
            self.x.data_ptr(),
            *self.parameter(self.context),
            *self.parameter(dcontext),
            _pointer(dx),
            _pointer(self.index),
            _pointer(self.bounds),
            *(self.tokens, self.d_in, self.context_dim, self.table, self.sequences, self.length),
            *(int(self.per_token), int(self.outer), _CODES[self.x.dtype], self.tf32),
            *(len(projections), self.budget),
        )
        flat = [value for projection in projections for value in projection]
        problem = _PROBLEM.pack(*head, *flat, *(0,) * (_MOST * _EACH - len(flat)), *(0,) * 8)
        x, library, size = self.x, cuda_runtime.load(), ctypes.c_int64(0)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
            workspace = None
            for launches in (False, True):
                if launches:
                    workspace = self.workspace(size.value, backward)
                address = None if workspace is None else -(-workspace.data_ptr() // 256) * 256
                given = problem, backward, x.device.index or 0, address, ctypes.byref(size), stream
                error = library.ctxkern_cuda_modulated(*given)
                if error:
                    raise RuntimeError(f"{self.described(backward)} failed: {error.decode()}")

    def workspace(self, size, backward):
        try:
            return torch.empty(size + 256, dtype=torch.uint8, device=self.x.device)
        except torch.OutOfMemoryError as error:
            what = f"{self.described(backward)} has no memory for its workspace of {size} bytes"
            raise torch.OutOfMemoryError(f"{what}: {error}") from error

    def described(self, backward):
        name = "modulated_backward" if backward else "modulated_forward"
        shapes = f"x {list(self.x.shape)} {self.x.dtype}, context {list(self.context.shape)}"
        return f"{name} on backend 'cuda' ({shapes})"


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    check_values(operands)
    outs, biases = new_outputs(operands), list(map(contiguous, operands.biases))
    call = _Call(operands, workspace_bytes)
    if call.tokens and call.d_in:
        call.run(list(map(call.projection, operands.weights, operands.bilinears, biases, outs)), False)
    else:
        fill_with_biases(outs, biases)
    return outs


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    douts = list(map(contiguous, douts))
    grads = new_gradients(douts, operands, needs)
    call = _Call(operands, workspace_bytes)
    if call.tokens and call.d_in and any(t.shape[1] for t in operands.bilinears):
        if grads.from_kernels():
            absent = [None] * len(douts)
            parameters = operands.weights, operands.bilinears, absent
            members = map(call.projection, *parameters, douts, grads.weights, grads.bilinears)
            call.run(list(members), True, grads.x, grads.context)
    else:
        for grad in grads.from_kernels():
            grad.zero_()
    return grads


def plan(operands, workspace_bytes, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    call = _Call(operands, workspace_bytes)
    d_in, d_out, k = operands.bilinears[0].shape
    has_weight = operands.weights[0] is not None
    problem = Problem(
        *(call.tokens, call.most_contexts, d_in, d_out, k),
        *(operands.x.dtype, operands.param_dtype, "cuda", call.per_token, has_weight),
    )
    rows, columns, group = _blocks(call, d_out, backward)
    return describe(
        problem,
        strategy="outer" if call.outer else "panel",
        backend="cuda",
        strip=d_out if call.outer else rows if backward else columns,
        group=call.tokens if call.outer else group,
        workspace_bytes=0 if call.outer else rows * columns * group * operands.x.element_size(),
        strip_of="D" if backward else "E",
    )


def _blocks(call, d_out, backward):
    """Rows of D, columns of E and contexts of a block, as the library cuts them."""
    sizes = (call.d_in, d_out, call.context_dim, call.most_contexts, call.x.element_size(), call.budget)
    cut = (ctypes.c_int64 * 3)()
    cuda_runtime.load().ctxkern_cuda_blocks((ctypes.c_int64 * 6)(*sizes), int(backward), cut)
    return tuple(cut)

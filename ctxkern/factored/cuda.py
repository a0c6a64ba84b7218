"""CUDA C++ kernels: those of the low-rank family (csrc/cuda/lora) with gates."""

from functools import partial

from ctxkern.lora import cuda

from .operands import lora_backward, lora_forward

forward = partial(lora_forward, cuda)
backward = partial(lora_backward, cuda)

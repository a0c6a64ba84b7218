"""Triton kernels: those of the low-rank family (ctxkern/lora/triton) with gates."""

from functools import partial

from ctxkern.lora import triton

from .operands import lora_backward, lora_forward

forward = partial(lora_forward, triton)
backward = partial(lora_backward, triton)

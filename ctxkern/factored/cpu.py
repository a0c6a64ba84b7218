"""C++ kernels on the CPU: those of the low-rank family (csrc/cpu/lora) with gates."""

from functools import partial

from ctxkern.lora import cpu

from .operands import lora_backward, lora_forward

forward = partial(lora_forward, cpu, together=True)
backward = partial(lora_backward, cpu, together=True)

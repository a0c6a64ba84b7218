"""Strips in plain PyTorch: the contract's promises on every device, with no compiled code."""

from .lora import lora_backward, lora_forward
from .modulated import modulated_backward, modulated_forward, plan_call

__all__ = ["lora_backward", "lora_forward", "modulated_backward", "modulated_forward", "plan_call"]

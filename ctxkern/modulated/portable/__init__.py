"""Strips in plain PyTorch: the contract's promises on every device, with no compiled code."""

from .modulated import modulated_backward, modulated_forward, plan_call

__all__ = ["modulated_backward", "modulated_forward", "plan_call"]

"""Strips in plain PyTorch: the contract's promises on every device, with no compiled code."""

from .modulated import backward, forward, plan

__all__ = ["backward", "forward", "plan"]

"""Triton kernels for GPUs: panel and outer (DESIGN.md §2). Imported when a call first needs it, Triton with it."""

from .modulated import modulated_backward, modulated_forward, plan_call

__all__ = ["modulated_backward", "modulated_forward", "plan_call"]

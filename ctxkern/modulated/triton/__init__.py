"""Triton kernels for GPUs: panel and outer (DESIGN.md §2). Imported when a call first needs it, Triton with it."""

from .modulated import backward, forward, plan

__all__ = ["backward", "forward", "plan"]

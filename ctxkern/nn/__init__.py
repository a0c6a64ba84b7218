"""Modules over the public functions."""

from .attention import ContextModulatedAttention, EinsumContextModulatedAttention
from .init import init_bilinear_
from .linear import Bilinear, DynamicLoraLinear, ModulatedLinear
from .plain import KVCache

__all__ = [
    "Bilinear",
    "ContextModulatedAttention",
    "DynamicLoraLinear",
    "EinsumContextModulatedAttention",
    "KVCache",
    "ModulatedLinear",
    "init_bilinear_",
]

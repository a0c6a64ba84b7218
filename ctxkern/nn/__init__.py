"""Modules over the public functions."""

from .attention import ContextModulatedAttention, EinsumContextModulatedAttention
from .cache import KVCache
from .init import init_bilinear_
from .linear import Bilinear, DynamicLoraLinear, ModulatedLinear

__all__ = [
    "Bilinear",
    "ContextModulatedAttention",
    "DynamicLoraLinear",
    "EinsumContextModulatedAttention",
    "KVCache",
    "ModulatedLinear",
    "init_bilinear_",
]

"""Modules over the public functions."""

from .attention import ContextModulatedAttention, EinsumContextModulatedAttention
from .cache import KVCache
from .factors import BilinearFactors
from .init import init_bilinear_, init_factors_
from .linear import Bilinear, DynamicLoraLinear, ModulatedLinear

__all__ = [
    "Bilinear",
    "BilinearFactors",
    "ContextModulatedAttention",
    "DynamicLoraLinear",
    "EinsumContextModulatedAttention",
    "KVCache",
    "ModulatedLinear",
    "init_bilinear_",
    "init_factors_",
]

"""Serving: weights of contexts made once and kept, and bilinear tensors in int8."""

from .cache import CacheStatistics, WeightCache, cache_weights
from .int8 import Int8Bilinear, quantize_bilinear

__all__ = ["CacheStatistics", "Int8Bilinear", "WeightCache", "cache_weights", "quantize_bilinear"]

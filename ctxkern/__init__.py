"""Context-modulated layers: a weight matrix for each context, none of which is kept whole."""

__version__ = "0.1.0"

from .functional import (
    bilinear,
    explain,
    explain_lora,
    factored_modulated_linear,
    lora_linear,
    modulated_linear,
    modulated_qkv,
)
from .nn.merge import merge
from .nn.swap import swap
from .plan import Plan
from .registry import backends

__all__ = [
    "Plan",
    "backends",
    "bilinear",
    "explain",
    "explain_lora",
    "factored_modulated_linear",
    "lora_linear",
    "merge",
    "modulated_linear",
    "modulated_qkv",
    "swap",
]

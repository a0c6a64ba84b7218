"""Context-modulated layers: a weight matrix for each context, none of which is kept whole."""

__version__ = "0.1.0"

from .attach import (
    AdapterAdamW,
    attach_adapters,
    attach_contexts,
    detach,
    export_adapter,
    import_adapter,
    load_attached,
    save_attached,
    use,
)
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
from .serve import cache_weights, quantize_bilinear

__all__ = [
    "AdapterAdamW",
    "Plan",
    "attach_adapters",
    "attach_contexts",
    "backends",
    "bilinear",
    "cache_weights",
    "detach",
    "explain",
    "explain_lora",
    "export_adapter",
    "factored_modulated_linear",
    "import_adapter",
    "load_attached",
    "lora_linear",
    "merge",
    "modulated_linear",
    "modulated_qkv",
    "quantize_bilinear",
    "save_attached",
    "swap",
    "use",
]

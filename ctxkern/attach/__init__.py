"""Contexts and adapters in models that someone else wrote: any linear layer of them, in place."""

from .attaching import attach_adapters, attach_contexts, detach
from .files import load_attached, save_attached
from .optimizer import AdapterAdamW
from .peft_files import export_adapter, import_adapter
from .using import use

__all__ = [
    "AdapterAdamW",
    "attach_adapters",
    "attach_contexts",
    "detach",
    "export_adapter",
    "import_adapter",
    "load_attached",
    "save_attached",
    "use",
]

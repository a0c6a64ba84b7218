"""Packages that only the experiments need."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""


def require(module: str, extra: str = "train") -> ModuleType:
    """Import `module`, or raise `MissingExtraError` saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} could not be imported ({error}): pip install 'ctxkern[{extra}]'") from error

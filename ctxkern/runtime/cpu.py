"""Loads the compiled core ctxkern._C when it is first asked for, and says why it is missing."""

import functools
import importlib
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

from .problem import difference


def build_info() -> dict[str, Any]:
    """What the build wrote: version, python, cpu and cuda (built, reason, compiler, ...); {} if it wrote nothing."""
    try:
        return json.loads((Path(__file__).parents[1] / "_build.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    try:
        importlib.import_module("torch")  # first, so that both share the OpenMP runtime that torch brings
        module = importlib.import_module("ctxkern._C")
        wrong = difference(module.problem_layout()) if hasattr(module, "problem_layout") else "it is of another version"
        return (None, f"_C does not fit this package: {wrong}: run pip install . again") if wrong else (module, "")
    except ImportError as error:
        info = build_info()
        if not info:
            return None, "not built: run pip install ."
        if info["cpu"]["built"]:
            python = info["python"]
            return None, f"built for {python}, but it does not load here ({error}): run pip install . again"
        return None, f"built without the compiled core because {info['cpu']['reason']}"


@functools.cache
def load() -> ModuleType:
    """The module _C.

    Raises:
        RuntimeError: it was not built or does not load, with the reason.
    """
    module, reason = _attempt()
    if module is None:
        raise RuntimeError(f"ctxkern._C is not available: {reason}")
    return module


@functools.cache
def core() -> ModuleType | None:
    """The module _C, or None where it is not available."""
    return _attempt()[0]


def available() -> bool:
    return core() is not None


def reason() -> str:
    """Why the compiled core is not available, or ''."""
    return _attempt()[1]


def cpu_isas() -> list[str] | None:
    """The instruction sets that kernels can use here, best last; None without the compiled core."""
    return load().cpu_isas() if available() else None


def cpu_isa() -> str | None:
    """The instruction set in use; None without the compiled core.

    Raises:
        ValueError: CTXKERN_CPU_ISA names one that is unknown, or that this build or machine does not have.
    """
    return load().cpu_isa() if available() else None


def cpu_name() -> str:
    """The processor's brand string, or what `platform` knows."""
    brand = load().cpu_name().strip() if available() else ""
    return brand or platform.processor() or platform.machine()

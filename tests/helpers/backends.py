"""Functions as each backend on the CPU runs them, and each instruction set of the compiled one."""

import contextlib
import functools

import pytest

from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.testing import force

HOW = ["portable", *(cpu_runtime.cpu_isas() or [])]
# for a fixture `fn`
everywhere = pytest.mark.parametrize("fn", HOW, indirect=True)
best = pytest.mark.parametrize("fn", sorted({HOW[0], HOW[-1]}), indirect=True)


@contextlib.contextmanager
def on(how, function):
    """The function on a backend or an instruction set."""
    if how == "portable":
        yield functools.partial(function, backend="portable")
        return
    with force(isa=how):
        yield functools.partial(function, backend="cpu")

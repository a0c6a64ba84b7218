"""The official way to run what the planner would not choose, for tests, tuning and benches."""

import contextlib

from ctxkern import plan
from ctxkern.runtime import cpu

STRATEGIES = ("panel", "outer")


@contextlib.contextmanager
def force(*, strategy=None, tiles=None, backend=None, isa=None, library=None):
    """Within it, calls take what is named here; None: as planned. Not for several threads at a time.

    Args:
        strategy: "panel" or "outer"; a context per token takes outer all the same.
        tiles: {kernel: `Tile`} in place of rows of the Triton tile table.
        backend: a name of `ctxkern.backends()`, for calls that name none.
        library: whether Triton's panel form takes the library's products where every context has as many rows, and
            low-rank layers in float32 on the CPU that with their base weight.
        isa: a name of `ctxkern.runtime.cpu.cpu_isas()`, for the C++ kernels.

    Raises:
        ValueError: a strategy or instruction set that there is not.
    """
    if strategy not in (None, *STRATEGIES):
        raise ValueError(f"strategy is {strategy!r}; it must be None or one of {', '.join(map(repr, STRATEGIES))}")
    kept = plan.Forced(**vars(plan.forced))
    wanted = {"strategy": strategy, "tiles": tiles, "backend": backend, "library": library}
    isa_before = cpu.load().force_cpu_isa(isa) if isa is not None else None
    vars(plan.forced).update({name: value for name, value in wanted.items() if value is not None})
    try:
        yield
    finally:
        vars(plan.forced).update(vars(kept))
        if isa_before is not None:
            cpu.load().force_cpu_isa(isa_before)

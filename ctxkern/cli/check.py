"""`ctxkern check`: what is installed, what can run, and whether its numbers are right. For a bug report."""

import argparse
import platform
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register `check`."""
    parser = subparsers.add_parser(
        "check",
        help="versions, devices, backends, and a numerical self-test",
        description="Prints versions, devices, instruction sets and backends (with the reason where one is not there), "
        "then compares every backend that is there with a float64 oracle. Exit status 1 if any is wrong.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is installed and test it; 1 if a number is wrong."""
    import torch

    import ctxkern
    from ctxkern.testing.selftest import self_tests

    for name, value in [*_versions(ctxkern, torch), *_devices(torch), *_compiled()]:
        print(f"{name:<14}{value}")
    print("\nbackends")
    for name, status in ctxkern.backends().items():
        print(f"  {name:<12}{status}")
    print("\nself-test against a float64 oracle")
    wrong = 0
    for title, failures, count, seconds in self_tests():
        verdict = "right" if not failures else f"WRONG in {len(failures)}"
        print(f"  {title:<34}{count:>4} checks  {seconds:6.1f} s  {verdict}", flush=True)
        for failure in failures[:5]:
            print(f"    {failure}")
        wrong += len(failures)
    print("\nall right" if not wrong else f"\n{wrong} checks are wrong")
    return 1 if wrong else 0


def _versions(ctxkern: ModuleType, torch: ModuleType) -> Iterator[tuple[str, str]]:
    yield "ctxkern", ctxkern.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "torch", torch.__version__
    try:
        import triton

        yield "triton", triton.__version__
    except ImportError:
        yield "triton", "not installed"


def _devices(torch: ModuleType) -> Iterator[tuple[str, str]]:
    from ctxkern import plan as planner
    from ctxkern.testing.measure import device_name

    yield "cpu", f"{device_name()}, {torch.get_num_threads()} threads, torch products use {planner.cpu_isa()}"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"gpu {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"


def _compiled() -> Iterator[tuple[str, str]]:
    from ctxkern.runtime import cpu as cpu_runtime

    if not cpu_runtime.available():
        yield "compiled core", f"no: {cpu_runtime.reason()}"
        return
    built = cpu_runtime.build_info().get("cpu", {})
    yield "compiled core", f"yes: {built.get('compiler', 'compiler not recorded')} {built.get('flags') or ''}"
    yield "instructions", f"{', '.join(cpu_runtime.cpu_isas())}; in use: {cpu_runtime.cpu_isa()}"

"""Which backends a machine has: GPUs that are too old, and what Triton needs to build its launcher."""

import importlib.machinery
import shutil
import sysconfig

import pytest
import torch

from ctxkern import registry

GPU = torch.device("cuda", 1)


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton and GPUs of capability 8.0 (cuda:0) and 7.5 (cuda:1), as far as the registry sees."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 0), (7, 5))[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("A100", "T4")[device])
    found = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: found)
    registry.forget()
    yield monkeypatch
    registry.forget()


def with_launcher(machine, tmp_path, compilers=("gcc",), headers=True):
    machine.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    if headers:
        (tmp_path / "Python.h").touch()
    machine.setattr(sysconfig, "get_path", lambda name: str(tmp_path))


def test_a_gpu_that_is_too_old_takes_portable_and_says_why(machine, tmp_path):
    with_launcher(machine, tmp_path)
    assert registry.statuses["triton"]
    assert registry.resolve("triton", torch.device("cuda", 0), torch.float16, "modulated") == "triton"
    assert registry.resolve(None, torch.device("cuda", 0), torch.float16, "modulated") == "triton"
    assert registry.resolve(None, GPU, torch.float16, "modulated") == "portable"
    with pytest.raises(RuntimeError, match=r"'triton' needs a GPU of compute capability 8.0 or later; T4 has 7.5"):
        registry.resolve("triton", GPU, torch.float16, "modulated")


@pytest.mark.parametrize(
    ("compilers", "headers", "named", "reason"),
    [
        ((), True, None, "gcc or clang not found"),
        (("gcc",), True, "icc", "CC=icc not found"),
        (("gcc",), False, None, "Python.h not found"),
    ],
    ids=["no compiler", "another compiler", "no headers"],
)
def test_triton_without_what_its_launcher_needs_is_not_chosen(machine, tmp_path, compilers, headers, named, reason):
    with_launcher(machine, tmp_path, compilers, headers)
    if named:
        machine.setenv("CC", named)
    assert reason in registry.statuses["triton"]
    assert registry.resolve(None, torch.device("cuda", 0), torch.float16, "modulated") != "triton"
    with pytest.raises(RuntimeError, match="build its launcher"):
        registry.resolve("triton", torch.device("cuda", 0), torch.float16, "modulated")


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_triton_with_any_compiler_is_chosen(machine, tmp_path, compiler):
    with_launcher(machine, tmp_path, (compiler,))
    assert registry.statuses["triton"]

"""The CUDA C++ kernels as a library for the CPU, by the emulation header (csrc/cuda/runtime/emulate.h)."""

import functools
import os
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from ctxkern import registry
from ctxkern.runtime import cuda as cuda_runtime

SOURCES = Path(__file__).parents[2] / "csrc"


def compiled(folder, *flags, sources=SOURCES, changed=None):
    """The library, of every family; changed: the folder without which sources are those of `emulated`, flags too."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or not sources.exists():
        pytest.skip("no C++ compiler or no sources here")
    given = shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", *given, *flags]
    running = []
    for source in sorted(sources.glob(f"cuda/{changed or '*'}/*.cu")):
        made = Path(folder) / f"{source.stem}.o"
        one = [*command, "-DCTXKERN_EMULATE", "-x", "c++", "-c", str(source), "-o", str(made)]
        running.append((made, subprocess.Popen(one, stderr=subprocess.PIPE, text=True)))
    for _, process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    library = Path(folder) / "emulated.so"
    objects = {made.name: str(made) for made, _ in running}
    if changed is not None:
        objects = {made.name: str(made) for made in _library().parent.glob("*.o")} | objects
    link = [*command, "-shared", *objects.values(), "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def planted(folder, file, old, new):
    """A copy of the sources with a fault in it."""
    sources = Path(folder) / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert old in text
    (sources / file).write_text(text.replace(old, new))
    return sources


def without_dtype(monkeypatch, backend):
    """The problems of a backend's module name a dtype of x that there is not."""
    problem_of = backend._problem

    def changed(*given):
        problem = problem_of(*given)
        problem.x.dtype = 7
        return problem

    monkeypatch.setattr(backend, "_problem", changed)


def forget():
    cuda_runtime._attempt.cache_clear()
    registry.forget()


@functools.cache
def _library():
    folder = Path(os.environ["CTXKERN_TESTS_FOLDER"], "emulated")
    folder.mkdir(exist_ok=True)
    # of the workers of pytest-xdist the first to come builds
    with FileLock(folder / "lock"):
        library = folder / "emulated.so"
        return library if library.exists() else compiled(folder)


@contextmanager
def emulated():
    """Backend "cuda" on the CPU; gives the library's path, which is built once a process."""
    kept = os.environ.get("CTXKERN_CUDA_LIBRARY")
    os.environ["CTXKERN_CUDA_LIBRARY"] = str(_library())
    forget()
    yield os.environ["CTXKERN_CUDA_LIBRARY"]
    del os.environ["CTXKERN_CUDA_LIBRARY"]
    if kept is not None:
        os.environ["CTXKERN_CUDA_LIBRARY"] = kept
    forget()

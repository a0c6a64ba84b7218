"""Installs of a copy of the tracked files: old and current pip, with and without a compiler, editable, in place."""

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ctxkern.runtime import cuda as cuda_runtime

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OLD_PIP = "23.2.1"  # the one that comes with Python 3.11
BUILD_SETTINGS = {"CXX", "CXXFLAGS", "LDFLAGS", "CTXKERN_BUILD_CUDA", "CTXKERN_CUDA_ARCHS", "PYTHONPATH"}
NO_COMPILER = {"CXX": "/nonexistent"}
CHECK = """
import json, ctxkern
from ctxkern.runtime import cpu as c
print(json.dumps([ctxkern.__file__, c.available(), c.reason(), c.cpu_isas(), c.build_info()]))
"""


def attempt(*command, cwd=None, **env):
    # nvcc takes a minute: where a test does not ask for it, it is left out
    kept = {name: value for name, value in os.environ.items() if name not in BUILD_SETTINGS}
    env = kept | {"CTXKERN_BUILD_CUDA": "0"} | env
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def run(*command, cwd=None, **env):
    done = attempt(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_venv(folder, *requirements):
    """A venv's Python; skips where the requirements cannot be had."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    done = attempt(python, "-m", "pip", "install", "--upgrade", *requirements)
    if done.returncode:
        pytest.skip(f"no package index to install {' '.join(requirements)} from: {done.stderr.strip()[-200:]}")
    return python


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The current pip and what a build without isolation needs, in a folder whose name a shell would split."""
    return make_venv(tmp_path_factory.mktemp("tools") / "a venv", "pip", "setuptools", "pybind11", "ninja")


@pytest.fixture(scope="module", params=[OLD_PIP, "current"], ids=lambda version: f"pip-{version}")
def pip(request, tmp_path_factory):
    if request.param == "current":
        return request.getfixturevalue("tools")
    return make_venv(tmp_path_factory.mktemp("old") / "venv", f"pip=={request.param}")


@pytest.fixture
def compiler():
    named = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, named)), None)
    return found or pytest.skip(f"no C++ compiler here ({', '.join(named)})")


@pytest.fixture
def source(tmp_path):
    """A copy of the tracked files, in a folder whose name a shell would split."""
    listed = attempt("git", "ls-files", "-z", cwd=ROOT)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    if not names:
        pytest.skip(f"git lists no files here: {listed.stderr.strip()}")
    copy = tmp_path / "a copy"
    for name in names:
        copy.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def installed(path, cwd, python=sys.executable):
    """What the ctxkern under `path` says of itself, with the torch of this process."""
    file, *rest = json.loads(run(python, "-c", CHECK, cwd=cwd, PYTHONPATH=str(path)))
    assert Path(file).parents[1] == Path(path)
    return rest


def build_in_place(python, source, **env):
    return run(python, "setup.py", "build_ext", "--inplace", cwd=source, **env)


def build_info(source):
    return json.loads(source.joinpath("ctxkern", "_build.json").read_text())


def wheel_names(python, project, folder, *options, **env):
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, *options, project, **env)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_install(pip, compiler, source, tmp_path):
    site = tmp_path / "site"
    run(pip, "-m", "pip", "install", "--no-deps", "--target", site, source)
    available, reason, isas, info = installed(site, tmp_path)
    assert available, reason
    assert isas[0] == "scalar"
    assert info["cpu"]["compiler_version"]


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_install_without_a_compiler(pip, how, source, tmp_path):
    site = tmp_path / "site"
    env = NO_COMPILER if how == "CXX" else {"PATH": str(Path(pip).parent)}
    run(pip, "-m", "pip", "install", "--no-deps", "--target", site, source, **env)
    available, reason, isas, info = installed(site, tmp_path)
    assert not available
    assert isas is None
    named = "CXX=/nonexistent" if how == "CXX" else "c++, g++ or clang++"
    assert reason == f"built without the compiled core because no C++ compiler was found ({named})"
    assert info["cpu"]["reason"] in reason


def test_editable(pip, compiler, source, tmp_path):
    run(pip, "-m", "pip", "install", "--no-deps", "--editable", source)
    try:
        code = "from importlib.util import find_spec; print(find_spec('ctxkern').origin)"
        assert Path(run(pip, "-c", code, cwd=tmp_path).strip()) == source / "ctxkern" / "__init__.py"
    finally:
        run(pip, "-m", "pip", "uninstall", "--yes", "ctxkern")
    available, reason, _, info = installed(source, tmp_path)
    assert available, reason
    assert info["cpu"]["built"]


def test_in_place_and_again_without_a_compiler(tools, compiler, source, tmp_path):
    build_in_place(tools, source)
    available, reason, _, _ = installed(source, tmp_path)
    assert available, reason
    assert {path.name for path in source.iterdir() if path.name.startswith(".ninja")} == set()
    build_in_place(tools, source, **NO_COMPILER)
    available, reason, _, _ = installed(source, tmp_path)
    assert not available
    assert "CXX=/nonexistent" in reason


BROKEN = {"no program": "", "fails": "#!/bin/sh\nexit 1\n", "writes nothing": "#!/bin/sh\n"}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_compiler(tools, source, tmp_path, text):
    compiler = tmp_path / "broken-cxx"
    compiler.write_text(text)
    compiler.chmod(0o755)
    build_in_place(tools, source, CXX=str(compiler))
    cpu = build_info(source)["cpu"]
    assert not cpu["built"]
    assert cpu["reason"].startswith(f"{compiler} does not build a C++17 shared library: ")


def test_compile_error_is_told(tools, compiler, source, tmp_path):
    source.joinpath("csrc", "cpu", "runtime", "wrong.cpp").write_text("int f() { return undeclared; }\n")
    build_in_place(tools, source)
    available, reason, _, _ = installed(source, tmp_path)
    assert not available
    assert "compilation failed: csrc/cpu/runtime/wrong.cpp:1" in reason
    assert "undeclared" in reason


# For each source suffix, the macros of the flags that it is compiled with, and one of those that it is not.
SUFFIXES = {
    "": ([], "__AVX2__"),
    "_avx2": (["__AVX2__", "__FMA__", "__F16C__"], "__AVX512F__"),
    "_avx512": (["__FMA__", "__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__"], "__AVX512BF16__"),
    "_avx512_bf16": (["__FMA__", "__AVX512VL__", "__AVX512BF16__"], "__AMX_TILE__"),
    "_amx_bf16": (["__FMA__", "__AVX512BF16__", "__AMX_TILE__", "__AMX_BF16__"], None),
}


def add_kernels(source):
    for suffix, (wanted, unwanted) in SUFFIXES.items():
        lines = [f"#ifndef {macro}\n#error {macro} is missing\n#endif" for macro in wanted]
        lines += [f"#ifdef {unwanted}\n#error {unwanted} is set\n#endif"] if unwanted else []
        lines.append(f'extern "C" __attribute__((visibility("default"))) int probe{suffix}() {{ return 0; }}')
        source.joinpath("csrc", "cpu", "runtime", f"probe{suffix}.cpp").write_text("\n".join(lines) + "\n")


def kernels_in(library):
    return {suffix for suffix in SUFFIXES if f"probe{suffix}\0".encode() in library.read_bytes()}


def test_each_source_gets_its_flags(tools, compiler, source):
    add_kernels(source)
    build_in_place(tools, source)
    cpu = build_info(source)["cpu"]
    assert cpu["built"], cpu["reason"]
    # What gcc and clang say where a probe needs more than its flags give.
    assert not any(text in error for text in ("mismatch", "target feature") for error in cpu["refused"].values())
    (library,) = source.glob("ctxkern/_C*")
    assert kernels_in(library) == {"", *(f"_{name}" for name in cpu["flag_sets"] if name != "baseline")}


@pytest.mark.parametrize("refused", ["-mavx2", "-mavx512bf16", "-mamx-tile"])
def test_refused_flags_leave_their_sources_out(tools, compiler, source, tmp_path, refused):
    add_kernels(source)
    wrapper = tmp_path / "old-cxx"
    wrapper.write_text(
        f'#!/bin/sh\nfor arg; do\n  [ "$arg" = {refused} ] && {{ echo "error: option {refused}" >&2; exit 1; }}\n'
        f'done\nexec {compiler} "$@"\n'
    )
    wrapper.chmod(0o755)
    build_in_place(tools, source, CXX=str(wrapper))
    _, reason, isas, info = installed(source, tmp_path)
    assert reason == ""
    cpu = info["cpu"]
    without = [name for name in SUFFIXES if name not in kernels_in(next(source.glob("ctxkern/_C*")))]
    assert without == [f"_{name}" for name in cpu["refused"] if name != "openmp"]
    assert cpu["refused"]["amx_bf16"] == f"error: option {refused}" or "immintrin.h" in cpu["refused"]["amx_bf16"]
    assert not set(isas) & set(cpu["refused"])


def test_cuda_is_reported(tools, source):
    build_in_place(tools, source, **NO_COMPILER, CTXKERN_BUILD_CUDA="0", CTXKERN_CUDA_ARCHS="80;90a")
    cuda = build_info(source)["cuda"]
    assert (cuda["built"], cuda["reason"], cuda["archs"]) == (False, "CTXKERN_BUILD_CUDA=0", ["80", "90a"])
    no_nvcc = {"CTXKERN_BUILD_CUDA": "", "CUDA_HOME": "/nonexistent", "PATH": str(Path(tools).parent)}
    build_in_place(tools, source, **NO_COMPILER, **no_nvcc)
    assert build_info(source)["cuda"]["reason"].startswith("nvcc was not found")
    done = attempt(tools, "setup.py", "build_ext", "--inplace", cwd=source, CTXKERN_BUILD_CUDA="no", **NO_COMPILER)
    assert done.returncode
    assert "CTXKERN_BUILD_CUDA is 'no'; it takes 0" in done.stderr


def test_cuda_kernels_are_built_where_nvcc_is(tools, source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on this machine")
    build_in_place(tools, source, **NO_COMPILER, CTXKERN_BUILD_CUDA="1", CTXKERN_CUDA_ARCHS="90")
    assert build_info(source)["cuda"]["built"]
    library = source / "ctxkern" / "_cuda_kernels.so"
    assert ctypes.CDLL(library).ctxkern_cuda_abi() == cuda_runtime._ABI
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("torch", "python", "cudart"))
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\necho "error: no licence today" >&2\nexit 1\n')
    broken.chmod(0o755)
    build_in_place(tools, source, **NO_COMPILER, CTXKERN_BUILD_CUDA="", CUDA_HOME=str(tmp_path))
    assert "no licence today" in build_info(source)["cuda"]["reason"]
    assert build_info(source)["cuda"]["archs"] == ["80", "90", "100"]
    broken.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 compute_90\nexit 1\n')
    build_in_place(tools, source, **NO_COMPILER, CTXKERN_BUILD_CUDA="", CUDA_HOME=str(tmp_path))
    assert build_info(source)["cuda"]["archs"] == ["80", "90"]
    assert not library.exists()
    done = attempt(
        tools,
        "setup.py",
        "build_ext",
        "--inplace",
        cwd=source,
        **NO_COMPILER,
        CTXKERN_BUILD_CUDA="1",
        CUDA_HOME=tmp_path,
    )
    assert done.returncode
    assert "CTXKERN_BUILD_CUDA=1, but nvcc" in done.stderr


def test_sdist_builds_the_same_wheel(tools, compiler, source, tmp_path):
    run(tools, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=source)
    (sdist,) = tmp_path.glob("ctxkern-*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(path.relative_to(source)) for path in source.glob("csrc/**/*.*")}
    assert {"csrc/cpu/runtime/isa.h", "csrc/cpu/runtime/isa.cpp", "csrc/problem.h"} <= csrc
    assert csrc | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= in_sdist
    names = wheel_names(tools, sdist, tmp_path / "sdist")
    assert names == wheel_names(tools, source, tmp_path / "tree")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "ctxkern/_build.json" in names
    assert any(name.startswith("ctxkern/_C.") for name in names)
    modules = {str(path.relative_to(source)) for path in source.glob("ctxkern/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_deleted_modules_are_not_shipped(tools, source, tmp_path):
    gone = source / "ctxkern" / "gone.py"
    gone.touch()
    options = ["--no-build-isolation"]
    assert "ctxkern/gone.py" in wheel_names(tools, source, tmp_path / "first", *options, **NO_COMPILER)
    gone.unlink()
    assert "ctxkern/gone.py" not in wheel_names(tools, source, tmp_path / "second", *options, **NO_COMPILER)

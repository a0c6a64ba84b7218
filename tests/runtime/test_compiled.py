"""ctxkern.runtime.cpu: what it says when there is no core, and what the core says of the machine."""

import importlib.machinery
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctxkern
from ctxkern.modulated.operands import Operands
from ctxkern.modulated.plan import cpu_terms
from ctxkern.runtime import cpu as cpu_runtime

ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
PACKAGE = Path(ctxkern.__file__).parent
BUILT = {"version": "0", "python": "cpython-1", "cpu": {"built": True, "reason": ""}}
SKIPPED = {"version": "0", "python": "cpython-1", "cpu": {"built": False, "reason": "no compiler was found"}}

needs_core = pytest.mark.skipif(not cpu_runtime.available(), reason=cpu_runtime.reason() or "available")


def python(code, path, **env):
    """Runs `code` in a fresh process that imports from `path`."""
    env = {**os.environ, "PYTHONPATH": str(path), **env}
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True)


def output(code, path, **env):
    done = python(code, path, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def stub(tmp_path):
    """A package with nothing but what loads the core, and a torch with nothing in it."""
    package = tmp_path / "ctxkern"
    package.joinpath("runtime").mkdir(parents=True)
    package.joinpath("__init__.py").touch()
    package.joinpath("runtime", "__init__.py").touch()
    tmp_path.joinpath("torch.py").touch()
    for name in ("cpu.py", "problem.py"):
        shutil.copy(PACKAGE / "runtime" / name, package / "runtime")
    return package


def stub_reason(stub):
    code = """
from ctxkern.runtime import cpu as cpu_runtime
assert not cpu_runtime.available()
assert cpu_runtime.cpu_isas() is None and cpu_runtime.cpu_isa() is None and cpu_runtime.cpu_name()
try:
    cpu_runtime.load()
except RuntimeError as error:
    assert cpu_runtime.reason() in str(error)
    print(cpu_runtime.reason())
"""
    return output(code, stub.parent)


@pytest.mark.parametrize("text", [None, "", "{"], ids=["missing", "empty", "cut short"])
def test_reason_without_build_info(stub, text):
    if text is not None:
        stub.joinpath("_build.json").write_text(text)
    assert stub_reason(stub) == "not built: run pip install ."


def test_reason_of_the_build(stub):
    stub.joinpath("_build.json").write_text(json.dumps(SKIPPED))
    assert stub_reason(stub) == "built without the compiled core because no compiler was found"


def test_reason_when_the_library_is_gone(stub):
    stub.joinpath("_build.json").write_text(json.dumps(BUILT))
    reason = stub_reason(stub)
    assert reason.startswith("built for cpython-1, but it does not load here (No module named 'ctxkern._C')")
    assert "pip install ." in reason


def test_reason_when_the_library_does_not_load(stub):
    stub.joinpath("_build.json").write_text(json.dumps(BUILT))
    library = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
    stub.joinpath(library).write_bytes(b"not a library")
    reason = stub_reason(stub)
    assert reason.startswith("built for cpython-1, but it does not load here (")
    assert library in reason


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("", "it is of another version"),
        ("from ctxkern.runtime import problem\n"
         "def problem_layout(): return problem.layout().replace('Problem.d_in', 'Problem.context_dim')\n",
         "it was built from other sources (Problem.context_dim"),
    ],
    ids=["without a layout", "another order"],
)  # fmt: skip
def test_a_core_of_other_sources_is_refused(stub, module, reason):
    stub.joinpath("_build.json").write_text(json.dumps(BUILT))
    stub.joinpath("_C.py").write_text(module)
    assert reason in stub_reason(stub)


def test_torch_is_imported_before_the_core_and_neither_at_import(stub):
    stub.joinpath("_C.py").write_text(
        "import sys\ntorch_first = 'torch' in sys.modules\n"
        "from ctxkern.runtime.problem import layout as problem_layout\n"
    )
    code = """
import sys
from ctxkern.runtime import cpu as cpu_runtime
loaded = {name for name in sys.modules if name.startswith(("ctxkern", "torch"))}
assert loaded == {"ctxkern", "ctxkern.runtime", "ctxkern.runtime.cpu", "ctxkern.runtime.problem"}, loaded
assert cpu_runtime.load().torch_first
assert cpu_runtime.available() and cpu_runtime.reason() == ""
loaded = {name for name in sys.modules if name.startswith("ctxkern")}
names = ("ctxkern", "ctxkern.runtime", "ctxkern.runtime.cpu", "ctxkern.runtime.problem", "ctxkern._C")
assert loaded == set(names), loaded
"""
    output(code, stub.parent)


def test_importing_ctxkern_loads_no_core():
    code = "import sys, ctxkern; print([name for name in sys.modules if name.endswith('._C') and 'ctxkern' in name])"
    assert output(code, PACKAGE.parent) == "[]"


def test_a_call_on_the_cpu_loads_no_cuda_kernels():
    code = """
import ctxkern, torch
ctxkern.modulated_linear(torch.randn(2, 3, 4), torch.randn(2, 2), None, torch.randn(4, 5, 2))
print(bool(ctxkern.backends()["cuda"]), "_cuda_kernels" in open("/proc/self/maps").read())
"""
    if torch.cuda.is_available() or not Path("/proc/self/maps").exists():
        pytest.skip("looks into /proc of a machine without a GPU")
    assert output(code, PACKAGE.parent) == "False False"


@needs_core
def test_build_info_and_cpu_name():
    info = cpu_runtime.build_info()
    assert info["cpu"]["built"]
    assert info["cpu"]["compiler_version"]
    # what the environment asks for does not undo this
    assert shlex.split(info["cpu"]["flags"])[-4:] == ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
    assert info["cuda"]["built"] or info["cuda"]["reason"]
    assert cpu_runtime.cpu_name().strip()


def machine_isas():
    """From the kernel's own list, to check the library's cpuid against."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":")[1].split())
            break
    needed = [
        set(),
        {"avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        {"avx512_bf16"},
        {"amx_tile", "amx_bf16"},
    ]
    count = next((i for i, names in enumerate(needed) if not names <= flags), len(needed))
    return ISAS[:count]


@needs_core
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads the flags that Linux lists on x86-64"
)
def test_isas_are_those_of_the_machine_and_the_compiler():
    built = {"scalar", *cpu_runtime.build_info()["cpu"]["flag_sets"]}
    assert cpu_runtime.cpu_isas() == [name for name in machine_isas() if name in built]


def core(code, **env):
    """Runs `code` with the bare library, which needs no torch."""
    return python(f"import sys; sys.path.append({str(PACKAGE)!r}); import _C; {code}", PACKAGE.parent, **env)


@needs_core
def test_the_best_isa_is_the_default():
    assert core("print(_C.cpu_isa() == _C.cpu_isas()[-1])", CTXKERN_CPU_ISA="").stdout.strip() == "True"


@needs_core
@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa(isa):
    done = core("print(_C.cpu_isa())", CTXKERN_CPU_ISA=isa)
    if isa in cpu_runtime.cpu_isas():
        assert done.stdout.strip() == isa
    else:
        assert f"ValueError: CTXKERN_CPU_ISA is '{isa}'" in done.stderr


@needs_core
@pytest.mark.parametrize("isa", ["AVX2", "avx", "avx512_bf16 ", "sse2"])
def test_unknown_isa(isa):
    done = core("_C.cpu_isa()", CTXKERN_CPU_ISA=isa)
    assert f"ValueError: CTXKERN_CPU_ISA is '{isa}'" in done.stderr
    assert done.stderr.strip().endswith("takes one of: " + ", ".join(cpu_runtime.cpu_isas()))


@needs_core
@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"x": 1.0}, TypeError, "a float was given; it must be a tensor"),
        (
            {"x": torch.zeros(2, 3, 4, dtype=torch.float64)},
            ValueError,
            "another dtype than float32, bfloat16 and float16",
        ),
        ({"x": torch.zeros(2, 4)}, ValueError, "a tensor has 2 dimensions; it must have 3"),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, RuntimeError, "meta"),
        ({"bilinears": [torch.zeros(4, 6)]}, ValueError, "a tensor has 2 dimensions; it must have 3"),
        ({"bilinears": ()}, ValueError, "a list or tuple of 1 was expected"),
        ({"context_index": torch.zeros(2, dtype=torch.int32)}, ValueError, "another dtype than int64"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, ValueError, "another dtype than int32"),
    ],
)
def test_the_core_refuses_what_it_cannot_read(change, error, what):
    given = {"x": torch.zeros(2, 3, 4), "context": torch.zeros(2, 5), "weights": [None]}
    given |= {"bilinears": [torch.zeros(4, 6, 5)], "biases": [None]}
    operands, terms = Operands(**given | change), cpu_terms(False, None)
    with pytest.raises(error, match=what):
        cpu_runtime.load().modulated_forward(operands, terms, 1 << 20, 1, bytes)


@needs_core
def test_a_torch_without_functions_for_tensors_leaves_the_core_out():
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import ctxkern
print(str(ctxkern.backends()["cpu"]))
print(list(ctxkern.modulated_linear(torch.zeros(2, 3, 4), torch.zeros(2, 5), None, torch.zeros(4, 6, 5)).shape))
"""
    reason, shape = output(code, PACKAGE.parent).splitlines()
    assert "does not load here (this torch has no table of DLPack 1.x for C" in reason
    assert shape == "[2, 3, 6]"

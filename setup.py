"""Builds ctxkern with its compiled core ctxkern/_C, or without it where there is no compiler for it.

setuptools has no flags per source file, so build_ext writes a build.ninja. What was built, and why anything was not,
goes into ctxkern/_build.json. Environment: CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, CTXKERN_BUILD_CUDA, CTXKERN_CUDA_ARCHS.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX_BF16 = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]

# Instruction set: its flags, and code that needs them from the compiler and the assembler.
FLAG_SETS = {
    "baseline": ([], "#include <vector>\nint f() { return std::vector<int>(1).size(); }"),
    "avx2": (AVX2, "__m256 f(__m256 a, __m128i b) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(b)); }"),
    "avx512": (AVX512, "__m512 f(__m512 a) { return _mm512_and_ps(a, a); }"),
    "avx512_bf16": (AVX512_BF16, "__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }"),
    "amx_bf16": (AMX_BF16, "void f() { _tile_dpbf16ps(0, 1, 2); }"),
}

# The first pattern that fits a source names its flag set; files of a set that the compiler refuses are left out.
SOURCES = {
    "csrc/cpu/*/*_avx2.cpp": "avx2",
    "csrc/cpu/*/*_avx512.cpp": "avx512",
    "csrc/cpu/*/*_avx512_bf16.cpp": "avx512_bf16",
    "csrc/cpu/*/*_amx_bf16.cpp": "amx_bf16",
    "csrc/cpu/*/*.cpp": "baseline",
}

CUDA_SOURCES = "csrc/cuda/*/*.cu"
CUDA_ARCHS = "80,90,100"


class NotBuiltError(Exception):
    """Why the core was left out."""


def first_error(output):
    lines = output.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error:" in line.lower()), lines[-1]).strip()


def find_compiler():
    if sys.platform == "win32":
        raise NotBuiltError("the compiled core is not ported to Windows")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    tried = f"CXX={shlex.join(named)}" if named else "c++, g++ or clang++"
    raise NotBuiltError(f"no C++ compiler was found ({tried})")


def find_ninja():
    try:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        packaged = None
    found = packaged or shutil.which("ninja")
    if not found:
        raise NotBuiltError("ninja was not found")
    return found


def probe(command, code):
    """Compiles and links `code` into a shared library; returns the error, or ''."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(code + "\n")
        command = [*command, str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return "" if library.exists() else "it wrote no file"
    return first_error(done.stderr or done.stdout).replace(f"{folder}/", "")


def ninja_path(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_args(args):
    return shlex.join(args).replace("$", "$$")


def write_ninja(folder, target, compiler, flags, link_flags, objects):
    """`objects`: (object, source, flags of its instruction set)."""
    text = [
        f"builddir = {ninja_path(folder)}",
        f"cxx = {ninja_args(compiler)}",
        f"flags = {ninja_args(flags)}",
        f"link_flags = {ninja_args(link_flags)}",
        "rule cxx",
        "  command = $cxx $flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link_flags",
    ]
    for obj, source, isa_flags in objects:
        text += [f"build {ninja_path(obj)}: cxx {ninja_path(source)}", f"  isa_flags = {ninja_args(isa_flags)}"]
    text += [f"build {ninja_path(target)}: link {' '.join(ninja_path(obj) for obj, _, _ in objects)}", ""]
    path = folder / "build.ninja"
    path.write_text("\n".join(text))
    return path


def find_sources():
    """Each source and the name of its flag set."""
    found = {}
    for pattern, flag_set in SOURCES.items():
        for path in sorted(glob(pattern)):
            found.setdefault(path, flag_set)
    return found


def build_core(target, temp, report):
    """Compiles the sources into `target`, noting into `report` what is known as it goes; raises NotBuiltError."""
    compiler = find_compiler()
    report["compiler"] = shlex.join(compiler)
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    # those of the environment first: an -O0 meant for other packages would undo -O3 and cost a factor of 20
    base = [*shlex.split(os.environ.get("CXXFLAGS", "")), "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
    report["flags"] = shlex.join(base)
    link = [*shared, *shlex.split(os.environ.get("LDFLAGS", ""))]

    error = probe([*compiler, *base, *link], FLAG_SETS["baseline"][1])
    if error:
        raise NotBuiltError(f"{report['compiler']} does not build a C++17 shared library: {error}")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    report["compiler_version"] = version.partition("\n")[0]

    for name, (flags, code) in FLAG_SETS.items():
        error = probe([*compiler, *base, *flags, *link], "#include <immintrin.h>\n" + code) if flags else ""
        if error:
            report["refused"][name] = error
        else:
            report["flag_sets"].append(name)
    error = probe([*compiler, *base, "-fopenmp", *link], "#include <omp.h>\nint f() { return omp_get_max_threads(); }")
    if error:
        report["refused"]["openmp"] = error
    report["openmp"] = not error
    openmp = ["-fopenmp"] if report["openmp"] else []

    try:
        import pybind11
    except ImportError as error:
        raise NotBuiltError("pybind11 was not found") from error
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
    have = [f"-DCTXKERN_HAVE_{name.upper()}" for name in report["flag_sets"] if name != "baseline"]
    objects = [
        (temp / Path(source).with_suffix(".o"), source, FLAG_SETS[flag_set][0])
        for source, flag_set in find_sources().items()
        if flag_set in report["flag_sets"]
    ]
    for path in [target, *(obj for obj, _, _ in objects)]:
        path.parent.mkdir(parents=True, exist_ok=True)
    flags = [*base, *openmp, *have, *(f"-I{path}" for path in sorted(includes))]
    build_file = write_ninja(temp, target, compiler, flags, [*link, *openmp], objects)
    done = subprocess.run(
        [find_ninja(), "-f", str(build_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise NotBuiltError(f"compilation failed: {first_error(done.stdout)}")


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


def cuda_archs(nvcc):
    """Those of CTXKERN_CUDA_ARCHS, or of CUDA_ARCHS as many as nvcc knows."""
    if "CTXKERN_CUDA_ARCHS" in os.environ:
        return re.findall(r"\w+", os.environ["CTXKERN_CUDA_ARCHS"])
    archs = CUDA_ARCHS.split(",")
    if nvcc is None:
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, errors="replace").stdout
    known = re.findall(r"compute_(\w+)", listed)
    return [arch for arch in archs if arch in known] if known else archs


def build_cuda(target):
    """Compiles the CUDA kernels into `target`, a library that links neither torch nor Python; returns the report.

    Machine code for every architecture, PTX of the last for later ones. Where CUDA was asked for (CTXKERN_BUILD_CUDA=1)
    a failure is an error, else it is in the report.
    """
    wanted = os.environ.get("CTXKERN_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"CTXKERN_BUILD_CUDA is {wanted!r}; it takes 0 (leave CUDA out) or 1")
    nvcc = find_nvcc()
    archs = cuda_archs(nvcc)
    report = {"built": False, "reason": "", "nvcc": None, "archs": archs}
    target.unlink(missing_ok=True)
    if wanted == "0":
        return report | {"reason": "CTXKERN_BUILD_CUDA=0"}
    if nvcc is None:
        report["reason"] = "nvcc was not found (CUDA_HOME, PATH)"
    else:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace").stdout
        report["nvcc"] = next(iter(re.findall(r"V([\d.]+)", version)), "unknown version")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "0"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for arch in archs:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"] if archs else []
        done = subprocess.run(
            [*command, *sorted(glob(CUDA_SOURCES)), "-o", str(target)], capture_output=True, text=True, errors="replace"
        )
        print(done.stdout, done.stderr, flush=True)
        report["built"] = done.returncode == 0 and target.exists()
        if not report["built"]:
            report["reason"] = f"nvcc {report['nvcc']} failed: {first_error(done.stderr or done.stdout)}"
    if wanted == "1" and not report["built"]:
        raise RuntimeError(f"CTXKERN_BUILD_CUDA=1, but {report['reason']}")
    return report


class Build(build):
    def run(self):
        # pip builds in the source tree, where a build/lib of another day would ship modules deleted since.
        for stale in glob("build/lib*"):
            shutil.rmtree(stale)
        super().run()


class BuildExt(build_ext):
    def target(self):
        return Path(self.build_lib, self.get_ext_filename("ctxkern._C"))

    def build_extension(self, ext):
        target = self.target()
        cpu = {"built": False, "reason": "", "compiler": None, "compiler_version": None, "flags": None}
        cpu |= {"flag_sets": [], "refused": {}, "openmp": False}
        try:
            build_core(target, Path(self.build_temp), cpu)
            cpu["built"] = True
        except NotBuiltError as reason:
            cpu["reason"] = str(reason)
            target.unlink(missing_ok=True)
            print(f"ctxkern: built without its compiled core: {reason}", file=sys.stderr, flush=True)
        info = {"version": self.distribution.get_version(), "python": sysconfig.get_config_var("SOABI")}
        info |= {"cpu": cpu, "cuda": build_cuda(self.cuda_target())}
        if not info["cuda"]["built"]:
            print(f"ctxkern: built without CUDA kernels: {info['cuda']['reason']}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name("_build.json").write_text(json.dumps(info, indent=2) + "\n")

    def cuda_target(self):
        return self.target().with_name("_cuda_kernels.so")

    def get_outputs(self):
        more = [self.target().with_name("_build.json"), self.cuda_target()]
        return [*super().get_outputs(), *(str(path) for path in more if path.exists())]

    def copy_extensions_to_source(self):
        package = Path(self.get_finalized_command("build_py").get_package_dir("ctxkern"))
        for built in (self.target(), self.cuda_target(), self.target().with_name("_build.json")):
            in_place = package / built.name
            in_place.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, in_place)


sources = list(find_sources())
others = [path for path in sorted(glob("csrc/**", recursive=True)) if Path(path).is_file() and path not in sources]
core = Extension("ctxkern._C", sources, depends=others, optional=True)  # `depends` go into the sdist too
setup(ext_modules=[core], cmdclass={"build": Build, "build_ext": BuildExt})

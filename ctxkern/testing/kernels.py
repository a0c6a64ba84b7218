"""Triton kernels without a GPU: what a call would launch, compiled ahead of time, and what came out.

Launches are recorded on tensors of the meta device, with every argument specialised as a launch would (pointers aligned
to 16 bytes, sizes that are 1 or multiples of 16), so that what is compiled here is what runs there.
"""

import contextlib
import inspect
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that a block can have there
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched."""

    kernel: triton.JITFunction
    signature: tuple
    constants: tuple
    aligned: tuple
    options: tuple

    @property
    def name(self):
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")


class _Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, num_stages=3, **kwargs):
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
        signature, constants, aligned = {}, {}, []
        for at, (name, value) in enumerate(bound.arguments.items()):
            constexpr = self.kernel.params[at].is_constexpr
            if constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
                aligned.append(at)
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(at)
        options = (("num_warps", num_warps), ("num_stages", num_stages))
        self.launches.append(
            Launch(self.kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)
        )


@contextlib.contextmanager
def recorded(*modules):
    """The launches of the kernels of modules, recorded in place of being run."""
    launches, kept = [], []
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                kept.append((module, name, value))
    try:
        for module, name, kernel in kept:
            setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


# matrix instructions and copies by the names that the machine code gives them
_INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "UTCHMMA": r"\bUTC\w*MMA\b",
    "HMMA": r"\bHMMA\b",
    "FFMA": r"\bFFMA2?\b",
    "MFMA": r"\bv_mfma\w*",
    "LDGSTS": r"\bLDGSTS\b",
    "UTMALDG": r"\bUTMALDG\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
}


@dataclass(frozen=True)
class Audit:
    """What a kernel compiled to. spills: loads and stores of local memory, or spilled registers where told so."""

    registers: int
    spills: int
    shared: int
    instructions: dict


def audit(launch, arch):
    """Compiles a `Launch` for a target and reads the machine code."""
    attrs = {(at,): [["tt.divisibility", 16]] for at in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attrs)
    compiled = triton.compile(source, target=TARGETS[arch], options=dict(launch.options) | {"enable_fp_fusion": True})
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        counts = _counts(text)
        numbers = {n: int(m) for n, m in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Audit(numbers["vgpr_count"], numbers["vgpr_spill_count"], compiled.metadata.shared, counts)
    text, registers = _disassemble(compiled.asm["cubin"])
    counts = _counts(text)
    return Audit(registers, counts.pop("LDL", 0) + counts.pop("STL", 0), compiled.metadata.shared, counts)


def _counts(text):
    found = Counter()
    for name, pattern in _INSTRUCTIONS.items():
        found[name] = len(re.findall(pattern, text))
    return {name: count for name, count in found.items() if count}


def _disassemble(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return text, int(re.search(r"REG:(\d+)", usage)[1])

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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxkern.lora import triton as lora
from ctxkern.lora.operands import Gates
from ctxkern.lora.operands import Gradients as LoraGradients
from ctxkern.lora.operands import Operands as LoraOperands
from ctxkern.lora.operands import Options as LoraOptions
from ctxkern.lora.triton import adapters, gradients, update
from ctxkern.modulated import triton as backend
from ctxkern.modulated.operands import Gradients, Operands
from ctxkern.modulated.triton import (
    outer,
    outer_backward,
    outer_parameters,
    panel,
    panel_backward,
    panel_parameters,
)
from ctxkern.plan import GPU_WORKSPACE
from ctxkern.runtime.triton import grouping, tiles

from .cases import Case, make_inputs
from .force import force

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that a block can have there
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
SHARED_LIMIT |= {"sm_89": 101_376, "sm_120": 101_376}
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

    @property
    def dtypes(self):
        """Of the tensors, each once."""
        kinds = [each for _, kind in self.signature for each in (kind if isinstance(kind, tuple) else (kind,))]
        return "+".join(dict.fromkeys(k[1:] for k in kinds if isinstance(k, str) and k.startswith("*")))

    @property
    def projections(self):
        """How many the launch takes."""
        return max((len(kind) for name, kind in self.signature if name == "d_outs"), default=1)

    @property
    def tile(self):
        """Constants and options, in a line."""
        named = [(name, value) for name, value in self.constants if isinstance(name, str)]
        flags = [name.lower() for name, value in named if value is True]
        sizes = [f"{name}={value}" for name, value in named if name.startswith(("BLOCK", "ROWS"))]
        return " ".join((*sizes, *(f"{name}={value}" for name, value in self.options), *flags))


class Launches(dict):
    """Each different `Launch` once, by its text; names: of all kernels launched, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []


class _Recorder:
    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, num_stages=3, enable_fp_fusion=None, sanitize_overflow=None, **kwargs):
        assert enable_fp_fusion, f"{self.kernel.fn.__name__} is launched without the options of all"
        assert sanitize_overflow is (False if self.kernel.debug else None), self.kernel.fn.__name__
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
        signature, constants, aligned = {}, {}, []

        def specialise(path, value, constexpr, special):
            if isinstance(value, tuple) and not constexpr:
                return tuple(specialise((*path, i), v, False, special) for i, v in enumerate(value))
            if constexpr or value is None or (special and isinstance(value, int) and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, torch.Tensor) or special and value % 16 == 0:
                aligned.append(path)
            if isinstance(value, torch.Tensor):
                return _TYPES[value.dtype]
            return "i32" if -(2**31) <= value < 2**31 else "i64"

        for parameter in self.kernel.params:
            value = bound.arguments[parameter.name]
            flags = parameter.is_constexpr, not parameter.do_not_specialize
            signature[parameter.name] = specialise((parameter.num,), value, *flags)
        named = ((self.kernel.params[path[0]].name if len(path) == 1 else path, v) for path, v in constants.items())
        options = (("num_warps", num_warps), ("num_stages", num_stages))
        if self.kernel.debug:
            options += (("debug", True), ("sanitize_overflow", False))
        launch = Launch(self.kernel, tuple(signature.items()), tuple(named), tuple(aligned), options)
        self.launches[str(launch)] = launch
        self.launches.names.append(launch.name)


@contextlib.contextmanager
def recorded(arch):
    """The `Launches` of all operators, recorded instead of run, with the tiles of a target."""
    launches, kept = Launches(), [(tiles, "architecture", tiles.architecture)]
    modulated = panel, panel_backward, panel_parameters, outer, outer_backward, outer_parameters
    for module in (grouping, *modulated, update, gradients, adapters):
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                kept.append((module, name, value))
    try:
        tiles.architecture = lambda device: tiles.family(arch)
        for module, name, kernel in kept[1:]:
            setattr(module, name, _Recorder(kernel, launches))
        tiles.forget()
        yield launches
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        tiles.forget()


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
    """What a kernel compiled to. spills: loads and stores of local memory, or, for AMD, spilled registers."""

    registers: int
    spills: int
    shared: int
    instructions: dict


def audit(launch, arch):
    """Compiles a `Launch` for a target and reads the machine code."""
    attrs = {path: [["tt.divisibility", 16]] for path in launch.aligned}
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


# the matrix unit of each target, as its instructions are called, and how halves must reach it
UNIT = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "MFMA"}
# the rows of a product's tile: the matrix unit of sm_90 and later takes 64, fewer go to the older one
_ROWS = {
    "panel_weights": "BLOCK_E",
    "panel_y": "BLOCK_M",
    "panel_g": "BLOCK_D",
    "panel_dx": "BLOCK_M",
    "panel_dbilinear": "BLOCK_E",
    "outer_y": "BLOCK_M",
    "lora_y": "BLOCK_M",
    "lora_dx": "BLOCK_M",
    "lora_dab": "BLOCK_C",
    "matmul": "BLOCK_M",
}


def faults(launch, arch, found):
    """What is wrong with an `Audit`: spills, too much shared memory, products of halves without the matrix unit."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{found.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
    halves = "bf16" in launch.dtypes or "fp16" in launch.dtypes
    halves &= dict(launch.constants).get("DTYPE") is not tl.float32
    large = dict(launch.constants).get(_ROWS.get(launch.name), 0) >= 64
    if halves and large and not found.instructions.get(UNIT[arch]):
        wrong.append(f"no {UNIT[arch]}: {found.instructions}")
    return wrong


# (case, workspace, projections): many rows per context; K in several blocks; equal contexts; strips and groups; sizes
# that 8 divides and not 16, odd ones; few rows per context; a context per token
PROBLEMS = [
    (Case("panel", 32, 512, 1024, 1024, 64), GPU_WORKSPACE, 3),
    (Case("panel-one", 32, 512, 1024, 1024, 64), GPU_WORKSPACE, 1),
    (Case("panel-wide-k", 64, 256, 1024, 1024, 128), GPU_WORKSPACE, 3),
    (Case("panel-wider-k", 16, 512, 512, 512, 300), GPU_WORKSPACE, 1),
    (Case("panel-shared", 32, 512, 1024, 1024, 64, rows=16, index=(0,) * 32), GPU_WORKSPACE, 3),
    (Case("panel-ragged", 4, 0, 512, 512, 64, lengths=(100, 200, 300, 400)), GPU_WORKSPACE, 1),
    (Case("panel-groups", 64, 128, 1024, 1024, 32), 1 << 20, 1),
    (Case("panel-eights", 16, 256, 1000, 1000, 32), GPU_WORKSPACE, 1),
    (Case("panel-odd", 13, 97, 385, 391, 47), GPU_WORKSPACE, 3),
    (Case("outer-decode", 64, 1, 2048, 2048, 32), GPU_WORKSPACE, 3),
    (Case("outer-one", 64, 1, 2048, 2048, 32), GPU_WORKSPACE, 1),
    (Case("outer-token", 4, 128, 512, 512, 64, per_token=True), GPU_WORKSPACE, 1),
]


# (case, rank, dropout) of low-rank updates: a matrix unit's rank, more, the most; odd sizes; mixtures of adapters, each
# of its own rank; rows of one adapter with gates
LORA_PROBLEMS = [
    (Case("lora", 8, 512, 2048, 2048, 1), 16, 0.0),
    (Case("lora-64", 8, 512, 2048, 2048, 1), 64, 0.0),
    (Case("lora-256", 8, 512, 2048, 2048, 1), 256, 0.0),
    (Case("lora-odd", 5, 97, 385, 391, 1), 8, 0.0),
    (Case("lora-odd-high", 5, 97, 385, 391, 1), 100, 0.0),
    (Case("lora-mixed", 16, 0, 2048, 2048, 1, rows=4, index=(0,) * 16, lengths=(256,) * 16), 16, 0.0),
    (Case("lora-dropout", 8, 512, 2048, 2048, 1), 16, 0.1),
    (Case("lora-dropout-256", 8, 512, 2048, 2048, 1), 256, 0.1),
    (Case("factored", 1, 4096, 2048, 2048, 1), 64, 0.0),
    (Case("factored-odd", 1, 4096, 385, 391, 1), 8, 0.0),
]


def launches_of(arch, problems, dtypes, lora_problems=()):
    """Each different launch of the forward and backward of problems, on tensors without memory; the library's none."""
    with recorded(arch) as launches, force(library=False):
        for case, workspace, count in problems:
            for dtype, param_dtype in dtypes:
                _launch(make_inputs(case, dtype, param_dtype, "meta"), workspace, count)
        for case, rank, dropout in lora_problems:
            for dtype, param_dtype in dtypes:
                _launch_lora(make_inputs(case, dtype, param_dtype, "meta"), rank, dropout, "factored" in case.id)
    return list(launches.values())


def _launch_lora(made, rank, dropout, gated):
    def like(*shape):
        return made.weight.new_empty(shape)

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    adapters, (d_in, d_out) = len(made.context), made.weight.shape
    A, B = like(adapters, rank, d_in), like(adapters, d_out, rank)
    indices = {"adapter_index": made.context_index, "cu_seqlens": made.cu_seqlens}
    ranks = None if made.context_index is None else empty(adapters)
    operands = LoraOperands(made.x, None, A, B, None, ranks=ranks, seed=empty(), **indices)
    options, rows, gates = LoraOptions(32 << 20, None, 0.5, dropout), made.x.shape[:-1].numel(), None
    if gated:
        values, products = (empty(count, rank, dtype=torch.float32) for count in (32, rows))
        gates = Gates(values, empty(rows), products)
    lora.forward(operands, options, gates)
    lora.backward(made.dy, operands, options, LoraGradients(True, False, True, True, False), gates)


def _launch(made, workspace, count):
    weights, bilinears, biases = ([t] * count for t in (made.weight, made.bilinear, made.bias))
    operands = Operands(made.x, made.context, weights, bilinears, biases, made.context_index, made.cu_seqlens)
    backend.forward(operands, workspace)
    backend.backward(
        [made.dy] * count, operands, workspace, Gradients.of([t is not None for t in operands.flat()[:-2]])
    )

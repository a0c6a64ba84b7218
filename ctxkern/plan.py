"""What a plan is, and what a device can do: measured rates, the floor that follows from them. Families plan themselves.

Tests and benches may override what is planned through `ctxkern.testing.force`, which sets `forced`.
"""

from dataclasses import dataclass, field
from functools import cache

import torch

DEFAULT_WORKSPACE = 32 << 20
# on a GPU more pays: wider blocks, fewer launches (bench/LOG.md)
GPU_WORKSPACE = 128 << 20


@dataclass(frozen=True)
class Rates:
    """Ceilings of a device: FLOP/s of a large matrix product by dtype, bytes/s of memory, and where they are from."""

    flops: dict
    bandwidth: float
    source: str


# GFLOP/s of a 2048³ torch.mm by dtype, GB/s of a large read, each per thread; AMX: one thread of a Xeon, the others:
# two threads of an EPYC (Zen 4). A dtype that is missing was not measured.
_CPU_CORE = {
    "amx": ({torch.float32: 135, torch.bfloat16: 850}, 11),
    "avx512_bf16": ({torch.float32: 92, torch.bfloat16: 208}, 17),
    "avx512": ({torch.float32: 92}, 17),
}
H100 = Rates({torch.bfloat16: 770e12}, 3.0e12, "H100, cuBLAS and a device copy")


def cpu_isa():
    """The instruction set that torch's own matrix products use here: amx, avx512_bf16, avx512 or avx2."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2"


def device_rates(device_type):
    """The `Rates` of a device type with all threads that torch uses, or None where nothing was measured."""
    if device_type == "cpu":
        if cpu_isa() not in _CPU_CORE:
            return None
        threads = torch.get_num_threads()
        flops, read = _CPU_CORE[cpu_isa()]
        return Rates(
            {dtype: rate * 1e9 * threads for dtype, rate in flops.items()},
            read * 1e9 * threads,
            f"{cpu_isa()}, {threads} threads",
        )
    if device_type == "cuda" and torch.cuda.is_available() and "H100" in torch.cuda.get_device_name():
        return H100
    return None


@cache
def compute_dtype(device_type, dtype):
    """The dtype in which matrix products of `dtype` run at full speed: float32 where a CPU has no units for a half."""
    if device_type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        mkldnn = torch.ops.mkldnn
        native = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
        return dtype if native() else torch.float32
    return dtype


def default_workspace(device_type):
    """Bytes that a call may use where it names none."""
    return GPU_WORKSPACE if device_type == "cuda" else DEFAULT_WORKSPACE


def floor(device_type, dtype, flops, moved):
    """(seconds, source of the rates) that products in `dtype` and `moved` bytes take at least; (None, "") where the
    device's rates are not known."""
    rates = device_rates(device_type)
    peak = rates and rates.flops.get(dtype)
    return (max(moved / rates.bandwidth, flops / peak), rates.source) if peak else (None, "")


@dataclass
class Forced:
    """What tests and benches ask for in place of the planned; None and missing keys: as planned."""

    backend: str | None = None
    strategy: str | None = None
    tiles: dict = field(default_factory=dict)
    library: bool | None = None


forced = Forced()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one modulated projection runs. Counts are of the forward; the backward is about twice each.

    flops, bytes: what the strategy asks for, with each of `contexts` distinct contexts made once. weights_made: how
    many weights are made: more where making the weight of a repeated context again costs less than bringing its
    sequences together. strip: how many rows of D or columns of E (`strip_of`) at a time; group: contexts (panel) or
    tokens (outer) at a time. workspace_bytes: temporary memory beyond O(N·D). linear_flops: those of one plain shared
    linear layer on the same x. floor_seconds: max(bytes / bandwidth, flops / peak) on the device, None where its rates
    are not known. predicted_seconds: of the GPU kernels on an H100, by a model of their launches; None elsewhere.
    library: whether products with x and dy are those of torch's library, not kernels of ours (Triton).
    """

    strategy: str
    backend: str
    tokens: int
    contexts: int
    d_in: int
    d_out: int
    context_dim: int
    strip: int
    group: int
    flops: int
    bytes: int
    workspace_bytes: int
    linear_flops: int
    floor_seconds: float | None = None
    rates: str = ""
    strip_of: str = "E"
    weights_made: int = 0
    predicted_seconds: float | None = None
    library: bool = False

    def __str__(self):
        floor = "unknown here" if self.floor_seconds is None else f"{self.floor_seconds * 1e3:.3g} ms ({self.rates})"
        unit = {"panel": "contexts", "outer": "tokens"}.get(self.strategy)
        lines = "columns of E" if self.strip_of == "E" else "rows of D"
        tiles = f"{self.strip} {lines} × {self.group} {unit} per strip" if unit else "one whole weight per sequence"
        ratio = self.flops / self.linear_flops if self.linear_flops else 1.0
        rows = self.tokens / max(self.contexts, 1)
        made = f", {self.weights_made} weights made" if self.weights_made > self.contexts else ""
        return "\n".join(
            (
                f"{self.strategy} on {self.backend}: {tiles}{', products by the library' if self.library else ''}",
                f"  N={self.tokens} tokens, U={self.contexts} contexts ({rows:.4g} tokens each){made}, "
                f"D={self.d_in}, E={self.d_out}, K={self.context_dim}",
                f"  flops      {self.flops:.4g} ({ratio:.3g}× a shared linear layer)",
                f"  bytes      {self.bytes:.4g}",
                f"  workspace  {self.workspace_bytes:.4g} bytes",
                f"  floor      {floor}",
                *self._predicted(),
            )
        )

    def _predicted(self):
        if self.predicted_seconds is None:
            return ()
        counted = 2 if self.strip_of == "D" else 1  # a backward
        at_least = counted * max(self.bytes / H100.bandwidth, self.flops / H100.flops[torch.bfloat16])
        share = at_least / self.predicted_seconds
        return (f"  predicted  {self.predicted_seconds * 1e3:.3g} ms on an H100, {share:.0%} of it the floor there",)

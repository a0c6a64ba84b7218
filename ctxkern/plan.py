"""Which way a call is computed, and what it must cost: a table of measured rates and a formula over the counts.

Strategies (N tokens, U distinct contexts, D = d_in, E = d_out, K = context_dim):
  einsum  one weight a sequence, made whole: what `backend="reference"` does
  panel   weights of all U contexts for a strip of rows of D, projected, next strip: 2NDE + 2UDEK operations
  outer   (x ⊗ c) as the operand, no weight made: 2NDEK operations
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch

DEFAULT_WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Rates:
    """Ceilings of a device: FLOP/s of a large matrix product by dtype, bytes/s of memory, and where they are from."""

    flops: dict
    bandwidth: float
    source: str


# GFLOP/s of a 2048³ torch.mm by dtype, GB/s of a large read, each a thread; AMX: one thread of a Xeon, the others: two
# threads of an EPYC (Zen 4). A dtype that is not here was not measured.
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


@dataclass(frozen=True)
class Plan:
    """How one modulated projection runs. Counts are of the forward; the backward is about twice each.

    flops, bytes: what the strategy asks for, with each of `contexts` distinct contexts made once. weights_made: how
    many are: more where making the weight of a repeated context again costs less than bringing its sequences together.
    strip: how many rows of D or columns of E (`strip_of`) at a time; group: contexts (panel) or tokens (outer).
    workspace_bytes: temporary memory beyond O(N·D). linear_flops: those of one plain shared linear layer on the same x.
    floor_seconds: max(bytes / bandwidth, flops / peak) on the device, None where its rates are not known.
    predicted_seconds: of the GPU kernels on an H100, by a model of their launches; None elsewhere.
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

    def __str__(self):
        floor = "unknown here" if self.floor_seconds is None else f"{self.floor_seconds * 1e3:.3g} ms ({self.rates})"
        unit = {"panel": "contexts", "outer": "tokens"}.get(self.strategy)
        lines = "columns of E" if self.strip_of == "E" else "rows of D"
        tiles = f"{self.strip} {lines} × {self.group} {unit} a strip" if unit else "one weight a sequence, whole"
        ratio = self.flops / self.linear_flops if self.linear_flops else 1.0
        rows = self.tokens / max(self.contexts, 1)
        made = f", {self.weights_made} weights made" if self.weights_made > self.contexts else ""
        return "\n".join(
            (
                f"{self.strategy} on {self.backend}: {tiles}",
                f"  N={self.tokens} tokens, U={self.contexts} contexts ({rows:.4g} tokens each)"
                f"{made}, "
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


class Problem(NamedTuple):
    """What a plan depends on: sizes, dtypes, where it runs and which copies of a strip its layout asks for."""

    tokens: int
    contexts: int
    d_in: int
    d_out: int
    context_dim: int
    dtype: torch.dtype
    param_dtype: torch.dtype
    device_type: str
    per_token: bool = False
    has_weight: bool = True
    strided: bool = False  # a strip of `bilinear` is no matrix as it lies
    backward: bool = False
    spread: int = 0  # sequences whose weights are gathered from those of the contexts

    @property
    def compute(self):
        return compute_dtype(self.device_type, self.dtype)

    @property
    def strip_of(self):
        """What a panel takes strips of: columns of E forward, unless strips are in a half; rows of D backward."""
        return "D" if self.backward or self.strip_dtype.itemsize == 2 else "E"

    @property
    def strip_dtype(self):
        """The dtype of products with parameters: that of the parameters, raised where products are in float32 at all;
        forward, beside a half and with contexts enough, that half: parameters are rounded as they are read."""
        if not (self.per_token or self.backward) and self.compute.itemsize == 2 and self.contexts >= _ROUNDED:
            return self.compute
        return torch.promote_types(self.param_dtype, self.compute)


# contexts from which a float32 `bilinear` is rounded to a half, strip by strip, ahead of the product: with 16 and 32
# it is 1.4 times as fast as the product in float32, with 8 it is slower (bench/LOG.md)
_ROUNDED = 12


@lru_cache(maxsize=4096)
def plan_modulated(problem, workspace_bytes=DEFAULT_WORKSPACE, backend="portable"):
    """The `Plan` of a modulated projection."""
    p = problem
    if backend == "reference":
        strategy, tiles = "einsum", (p.d_in, p.contexts)
        used = 0 if p.per_token else p.contexts * p.d_in * p.d_out * p.strip_dtype.itemsize
    elif p.per_token or _outer_cost(p) < _panel_cost(p):
        strategy = "outer"
        *tiles, used = _outer_tiles(p, workspace_bytes)
    else:
        strategy = "panel"
        *tiles, used = _panel_tiles(p, workspace_bytes)
    flops, moved = counts(p, "outer" if strategy == "outer" or p.per_token else "panel")
    return Plan(
        strategy,
        backend,
        p.tokens,
        p.contexts,
        p.d_in,
        p.d_out,
        p.context_dim,
        *tiles,
        flops,
        moved,
        used,
        2 * p.tokens * p.d_in * p.d_out,
        *floor(p, flops, moved),
        p.strip_of if strategy == "panel" else "E",
        0 if strategy == "outer" else p.contexts,
    )


# weights, in elements, below which the operations that bring sequences together cost more than making weights twice:
# at 2^18 with 12 contexts of 16 sequences sharing lost 9 %, at 2^23 with 4 of 32 it won 37 % over the einsum
_WORTH_GROUPING = 1 << 20


def sharing_pays(sequences, contexts, shape):
    """Whether to make the weights [D, E] of repeated contexts once, at the price of grouping their sequences."""
    d_in, d_out, context_dim = shape
    spared = (sequences - contexts) * context_dim
    return spared > 0 and (spared * 2 > _TRAFFIC * sequences or sequences * d_in * d_out > _WORTH_GROUPING)


# operations that writing and reading an element of the intermediate costs beside a product's, and the rate of the outer
# form's products in float32 over the panel's: chosen by the crossover at R = 1 to 3 (bench/LOG.md)
_TRAFFIC = 24
_OUTER_RATE = 0.8


# The C++ kernels take the outer form where rows · N + fixed < contexts · U: what a row costs there, what a context
# costs in the panel, and what the outer form costs beyond that, each in products with one context (2DEK operations);
# fitted to U = 8 to 512 contexts of 1 to 4 rows (bench/LOG.md). By words of a float32 or two bfloat16, and by pass.
_CPU_TERMS = {
    ("f32", "forward"): (1.0, 1.21, 18.0),
    ("f32", "backward"): (1.56, 3.6, 20.0),
    ("bf16", "forward"): (1.0, 1.42, 69.0),
    ("bf16", "backward"): (1.96, 4.9, 40.0),
}
# rows a context up to which a GPU takes the outer form: by the counts, not measured yet
GPU_OUTER_ROWS = 4
# whether a GPU runs the panel form's forward as one persistent launch; None: where that was measured to be faster
GPU_PERSISTENT = None

# bytes of `bilinear` up to which it stays in cache, and laying it out for the outer form's forward costs nothing
_CPU_CACHED = 8 << 20


def cpu_outer_terms(pairs, backward, bilinear_bytes):
    """(rows, contexts, fixed) of the C++ kernels' choice between panel and outer; pairs: words of two bfloat16."""
    rows, contexts, fixed = _CPU_TERMS["bf16" if pairs else "f32", "backward" if backward else "forward"]
    return rows, contexts, fixed if backward or bilinear_bytes > _CPU_CACHED else 0.0


def counts(problem, strategy):
    """(flops, bytes) of a modulated projection's forward by panel or outer, each distinct context made once."""
    p = problem
    if strategy == "outer":
        flops = 2 * p.tokens * p.d_in * p.d_out * (p.context_dim + p.has_weight)
    else:
        flops = 2 * p.tokens * p.d_in * p.d_out + 2 * p.contexts * p.d_in * p.d_out * p.context_dim
    elements = p.d_in * p.d_out * (p.context_dim + p.has_weight) + p.contexts * p.context_dim
    return flops, p.tokens * (p.d_in + p.d_out) * p.dtype.itemsize + elements * p.param_dtype.itemsize


def floor(problem, flops, moved):
    """(seconds, where the rates are from) that the device needs at least; (None, "") where its rates are not known."""
    rates = device_rates(problem.device_type)
    peak = rates and rates.flops.get(problem.compute)
    return (max(moved / rates.bandwidth, flops / peak), rates.source) if peak else (None, "")


def _panel_cost(p):
    weights = p.contexts * p.d_in * p.d_out
    return 2 * p.tokens * p.d_in * p.d_out + weights * (2 * p.context_dim + _TRAFFIC)


def _outer_cost(p):
    cost = p.tokens * p.d_out * p.context_dim * (2 * p.d_in + _TRAFFIC)
    return cost if p.compute.itemsize == 2 and p.param_dtype.itemsize == 2 else cost / _OUTER_RATE


def _sizes(p):
    wide, narrow = p.strip_dtype.itemsize, p.compute.itemsize
    element = wide if p.strip_dtype == p.compute else wide + narrow
    copied = wide if p.strided or p.param_dtype != p.strip_dtype else 0
    return element, copied


# strips in float32 that stay in cache beside what they are multiplied with: 10 % faster than 32 MiB (bench/LOG.md)
_CACHED_PANEL = 16 << 20
# the intermediate of the outer form, likewise
_CACHED_OUTER = 8 << 20


def _panel_tiles(p, budget):
    """(strip, contexts, bytes): the pair that fits the budget with the least loss in the two products."""
    element, copied = _sizes(p)
    size, across = (p.d_in, p.d_out) if p.strip_of == "D" else (p.d_out, p.d_in)
    if p.device_type == "cpu" and p.strip_dtype.itemsize > 2:
        budget = min(budget, _CACHED_PANEL)
    held = 1 + p.spread / max(p.contexts, 1)
    best = None
    for strip in _halvings(size):
        for group in (p.contexts,) if p.spread else _halvings(p.contexts):
            gathered = (2 if p.backward else 1) * copied + (4 if p.backward and group < p.contexts else 0)
            used = int(strip * across * (group * element * held + p.context_dim * gathered))
            if p.backward and p.strip_dtype.itemsize > 2:
                used += strip * group * p.context_dim * p.strip_dtype.itemsize
            if used <= budget or (strip <= 1 and group <= 1):
                # the narrow size of the projection is `strip`, that of the weights' making is `group`
                project = p.tokens * (1 + 16 / strip)
                make = p.contexts * p.context_dim * (1 + 4 / group)
                if best is None or project + make < best[0]:
                    best = (project + make, strip, group, used)
                break
    if best is None:
        return 1, p.contexts, int(across * p.contexts * element * held)
    return best[1:]


def _outer_tiles(p, budget):
    """(columns of E, tokens, bytes) of the intermediate [tokens, columns, K] and of the strip of `bilinear`."""
    _, copied = _sizes(p)
    wide = p.strip_dtype.itemsize
    if p.device_type == "cpu":
        budget = min(budget, _CACHED_OUTER)
    group = max(1, min(p.tokens, 1024))
    while True:
        # the strip of bilinear where it is copied, and in the backward its gradient, in float32 over several chunks
        held = copied + (wide + (4 if group < p.tokens else 0) if p.backward else 0)
        column = p.context_dim * (group * wide + p.d_in * held)
        strip = min(p.d_out, budget // max(column, 1))
        if strip >= min(max(p.d_out, 1), 8) or group == 1:
            strip = max(1, strip)
            return strip, group, strip * column
        group = -(-group // 2)


def _halvings(n):
    n = max(n, 1)
    while True:
        yield n
        if n == 1:
            return
        n = -(-n // 2)

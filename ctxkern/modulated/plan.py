"""Which way a modulated projection is computed, what it counts, and the one place that makes its `Plan`.

Strategies (N tokens, U distinct contexts, D = d_in, E = d_out, K = context_dim):
  einsum  one whole weight per sequence: what `backend="reference"` does
  panel   weights of all U contexts for a strip, projected, next strip: 2NDE + 2UDEK operations
  outer   (x ⊗ c) as the operand, no weight made: 2NDEK operations
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from ctxkern.plan import Plan, compute_dtype, floor, forced


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
    strided: bool = False  # a strip of `bilinear` is not a matrix as it lies
    backward: bool = False
    spread: int = 0  # sequences whose weights are gathered from those of the contexts

    @property
    def compute(self):
        return compute_dtype(self.device_type, self.dtype)


class CpuTerms(NamedTuple):
    """What decides between the forms of the C++ kernels, in products with one context (2DEK operations)."""

    rows: float  # what a row costs in the outer form
    contexts: float  # what a context costs in the panel form
    fixed: float = 0.0  # what the outer form costs beyond its rows, where `bilinear` has more bytes than `cached`
    cached: float = 8.0 * 2**20
    # the same where rows of K elements share cache lines: the outer form writes dbilinear column by column
    fixed_shared: float = 0.0
    cached_shared: float = 8.0 * 2**20
    each_k: float = 0.0  # what it costs in addition, times K


# Fitted to U = 2 to 512 contexts of 1 to 4 rows (bench/LOG.md), by words: of one float32 below AVX-512, of one with it
# (weights are then made with the contexts as lanes), and of two bfloat16.
_CPU_TERMS = {
    "forward": (
        CpuTerms(1.0, 1.21, fixed=18.0, fixed_shared=18.0),
        CpuTerms(1.0, 1.21, each_k=0.6),
        CpuTerms(1.0, 1.42, each_k=1.1),
    ),
    "backward": (
        CpuTerms(1.56, 3.0, fixed=5.0, fixed_shared=16.0, cached_shared=3.0 * 2**20),
        CpuTerms(1.56, 3.0, fixed=5.0, fixed_shared=16.0, cached_shared=3.0 * 2**20),
        CpuTerms(2.0, 3.8, fixed=9.0, fixed_shared=19.0, cached_shared=3.0 * 2**20),
    ),
}
# rows, contexts and the fixed part, by the counts, not measured: outer up to and including four rows per context
_GPU_TERMS = (1.0, 4.0, -0.5)

# portable: operations that writing and reading an element of the intermediate costs, compared with a product's, and the
# rate of the outer form's products in float32 over the panel's: chosen by the crossover at R = 1 to 3 (bench/LOG.md)
TRAFFIC = 24
_OUTER_RATE = 0.8


def outer_above(terms, tokens, per_token=False):
    """The number of distinct contexts above which the outer form runs: where rows · N + fixed < contexts · U.

    terms: (rows, contexts, fixed). A context per token always takes the outer form.
    """
    if per_token:
        return -1.0
    if forced.strategy is not None:
        return -1.0 if forced.strategy == "outer" else float("inf")
    rows, contexts, fixed = terms
    return (rows * tokens + fixed) / contexts


@lru_cache
def cpu_terms(backward, strategy):
    """`CpuTerms` by words, as above; such that one form always runs for a `strategy` (`forced.strategy`) that is not
    None."""
    if strategy is None:
        return _CPU_TERMS["backward" if backward else "forward"]
    fixed = -1.0 if strategy == "outer" else float("inf")
    return (CpuTerms(0.0, 1.0, fixed, -1.0, fixed, -1.0),) * 3


def gpu_terms():
    """Terms of the GPU kernels."""
    return _GPU_TERMS


def by_library(uniform, pays):
    """Whether the panel form leaves the products with rows of x and dy to torch's library.

    uniform: every context has as many rows, in the order of the table, as shapes tell. pays: () → whether it costs
    less.
    """
    if not uniform or forced.library is False:
        return False
    return forced.library or pays()


def portable_terms(problem):
    """Terms of the PyTorch form, from the operations and the traffic of both."""
    p = problem
    rate = 1.0 if p.compute.itemsize == 2 and p.param_dtype.itemsize == 2 else _OUTER_RATE
    rows = p.context_dim * (2 * p.d_in + TRAFFIC) / rate - 2 * p.d_in
    return rows, max(p.d_in * (2 * p.context_dim + TRAFFIC), 1), 0.0


def counts(problem, strategy):
    """(flops, bytes) of a projection's forward by panel or outer, each distinct context made once."""
    p = problem
    if strategy == "outer":
        flops = 2 * p.tokens * p.d_in * p.d_out * (p.context_dim + p.has_weight)
    else:
        flops = 2 * p.tokens * p.d_in * p.d_out + 2 * p.contexts * p.d_in * p.d_out * p.context_dim
    elements = p.d_in * p.d_out * (p.context_dim + p.has_weight) + p.contexts * p.context_dim
    return flops, p.tokens * (p.d_in + p.d_out) * p.dtype.itemsize + elements * p.param_dtype.itemsize


def describe(
    problem,
    *,
    strategy,
    backend,
    strip,
    group,
    workspace_bytes,
    strip_of="E",
    weights_made=None,
    predicted_seconds=None,
    library=False,
):
    """The `Plan` of a problem whose strategy and tiles a backend has chosen."""
    p = problem
    flops, moved = counts(p, "outer" if strategy == "outer" or p.per_token else "panel")
    floor_seconds, rates = floor(p.device_type, p.compute, flops, moved)
    return Plan(
        strategy=strategy,
        backend=backend,
        tokens=p.tokens,
        contexts=p.contexts,
        d_in=p.d_in,
        d_out=p.d_out,
        context_dim=p.context_dim,
        strip=strip,
        group=group,
        flops=flops,
        bytes=moved,
        workspace_bytes=workspace_bytes,
        linear_flops=2 * p.tokens * p.d_in * p.d_out,
        floor_seconds=floor_seconds,
        rates=rates,
        strip_of=strip_of if strategy == "panel" else "E",
        weights_made=(0 if strategy == "outer" else p.contexts) if weights_made is None else weights_made,
        predicted_seconds=predicted_seconds,
        library=library,
    )

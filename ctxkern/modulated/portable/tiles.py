"""How the PyTorch form cuts a projection: strips, groups and the workspace they take."""

from functools import lru_cache

import torch

from ctxkern.modulated.plan import TRAFFIC, Problem, describe, outer_above, portable_terms
from ctxkern.plan import DEFAULT_WORKSPACE

# contexts from which a float32 `bilinear` is rounded to a half, strip by strip, ahead of the product: with 16 and 32
# it is 1.4 times as fast as the product in float32, with 8 it is slower (bench/LOG.md)
_ROUNDED = 12
# weights, in elements, below which the operations that bring sequences together cost more than making weights twice:
# at 2^18 with 12 contexts of 16 sequences sharing lost 9 %, at 2^23 with 4 of 32 it won 37 % over the einsum
_WORTH_GROUPING = 1 << 20
# strips in float32 that stay in cache with what they are multiplied with: 10 % faster than 32 MiB (bench/LOG.md)
_CACHED_PANEL = 16 << 20
# the intermediate of the outer form, likewise
_CACHED_OUTER = 8 << 20


def strip_dtype(p: Problem) -> torch.dtype:
    """The dtype of products with parameters: that of the parameters, raised where products are in float32 at all;
    forward, next to a half and with enough contexts, that half: parameters are rounded as they are read."""
    if not (p.per_token or p.backward) and p.compute.itemsize == 2 and p.contexts >= _ROUNDED:
        return p.compute
    return torch.promote_types(p.param_dtype, p.compute)


def strip_of(p: Problem) -> str:
    """What a panel takes strips of: columns of E forward, unless strips are in a half; rows of D backward."""
    return "D" if p.backward or strip_dtype(p).itemsize == 2 else "E"


@lru_cache(maxsize=4096)
def _planned(problem, workspace_bytes, backend, above):
    p = problem
    if backend == "reference":
        strategy, strip, group = "einsum", p.d_in, p.contexts
        used = 0 if p.per_token else p.contexts * p.d_in * p.d_out * strip_dtype(p).itemsize
    elif p.contexts > above:
        strategy = "outer"
        strip, group, used = _outer_tiles(p, workspace_bytes)
    else:
        strategy = "panel"
        strip, group, used = _panel_tiles(p, workspace_bytes)
    return describe(
        p, strategy=strategy, backend=backend, strip=strip, group=group, workspace_bytes=used, strip_of=strip_of(p)
    )


def plan(problem: Problem, workspace_bytes: int = DEFAULT_WORKSPACE, backend: str = "portable"):
    """The `Plan` of a modulated projection in PyTorch, or by the reference."""
    above = outer_above(portable_terms(problem), problem.tokens, problem.per_token)
    return _planned(problem, workspace_bytes, backend, above)


def sharing_pays(sequences, contexts, shape):
    """Whether to make the weights [D, E] of repeated contexts once, at the price of grouping their sequences."""
    d_in, d_out, context_dim = shape
    spared = (sequences - contexts) * context_dim
    return spared > 0 and (spared * 2 > TRAFFIC * sequences or sequences * d_in * d_out > _WORTH_GROUPING)


def _sizes(p):
    wide, narrow = strip_dtype(p).itemsize, p.compute.itemsize
    element = wide if strip_dtype(p) == p.compute else wide + narrow
    copied = wide if p.strided or p.param_dtype != strip_dtype(p) else 0
    return element, copied


def _panel_tiles(p, budget):
    """(strip, contexts, bytes): the pair that fits the budget with the least loss in the two products."""
    element, copied = _sizes(p)
    wide = strip_dtype(p).itemsize
    size, across = (p.d_in, p.d_out) if strip_of(p) == "D" else (p.d_out, p.d_in)
    if p.device_type == "cpu" and wide > 2:
        budget = min(budget, _CACHED_PANEL)
    held = 1 + p.spread / max(p.contexts, 1)
    best = None
    for strip in _halvings(size):
        for group in (p.contexts,) if p.spread else _halvings(p.contexts):
            gathered = (2 if p.backward else 1) * copied + (4 if p.backward and group < p.contexts else 0)
            used = int(strip * across * (group * element * held + p.context_dim * gathered))
            if p.backward and wide > 2:
                used += strip * group * p.context_dim * wide
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
    wide = strip_dtype(p).itemsize
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

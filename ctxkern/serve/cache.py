"""The weights of contexts made once and kept: for inference over a set of contexts that come again.

A context has a slot, the same one in every layer, and each projection an array of slots, [slots, D, E] in chunks, so
that neighbouring slots are one batched product without a copy. Contexts leave by slot, the least recently used first.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctxkern.checks import autocast_enabled
from ctxkern.dtypes import FLOATS, mixes
from ctxkern.ops import takes_reference

from .batches import Batch, Batches, Plan, plan_of, project
from .int8 import Int8Bilinear, parts
from .making import blocks, wide_dtype
from .stamps import Stamp

# slots of one allocation, at least: contexts that come one by one are neighbours all the same
_CHUNK = 4
# bytes of temporary memory where weights are made
_MAKING = 8 << 20


class CacheStatistics(NamedTuple):
    """What a cache did. hits, misses: weights, one of a layer and context each, that were there or had to be made;
    evictions: contexts that made room for others; dropped: weights whose parameter had changed; uncached: calls of
    layers that were computed without the cache; contexts, bytes: what it holds."""

    hits: int
    misses: int
    evictions: int
    dropped: int
    uncached: int
    contexts: int
    bytes: int


class Base(NamedTuple):
    """The shared weight of a projection: the parameter as the layer has it, and as [D, E], a view; None each: none."""

    parameter: Tensor | None
    weight: Tensor | None


class _Projection:
    """The kept weights of one bilinear tensor."""

    def __init__(self, bilinear: Any, base: Base, dtype: torch.dtype | None) -> None:
        self.d_in, self.d_out, self.context_dim = bilinear.shape
        values, scales = parts(bilinear)
        # without a weight that of the bilinear tensor, float32 for int8
        own = values.dtype if scales is None else torch.float32
        self.dtype = dtype or (own if base.parameter is None else base.parameter.dtype)
        self.chunks: dict[int, Tensor] = {}
        self.made: set[int] = set()
        self.stamp: Stamp | None = None

    @property
    def slot_bytes(self) -> int:
        return self.d_in * self.d_out * self.dtype.itemsize


class Kept:
    """Of a layer: its cache, and its projections by the names of their bilinear tensors. A copy of it has none."""

    def __init__(self, cache: WeightCache, projections: dict[str, _Projection]) -> None:
        self.cache, self.projections = cache, projections

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class WeightCache:
    """What `cache_weights` returns. Closed at the end of a `with` block, or by `close`.

    Attributes:
        max_contexts: how many contexts it has room for.
        context_bytes: what the weights of one context take in all layers together.
    """

    def __init__(self, layers: dict[str, nn.Module], max_bytes: int, dtype: torch.dtype | None) -> None:
        self._layers = list(layers.values())
        self._lock = threading.Lock()
        self._batches = Batches()
        self._kept = [Kept(self, _projections(layer, dtype)) for layer in self._layers]
        self._projections = [p for kept in self._kept for p in kept.projections.values()]
        self.context_bytes = sum(p.slot_bytes for p in self._projections)
        if max_bytes < self.context_bytes:
            raise ValueError(
                f"cache_weights: max_bytes is {max_bytes}; it must be at least {self.context_bytes}, which the weights "
                "of one context take in all layers"
            )
        self.max_contexts = max_bytes // max(self.context_bytes, 1)
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._places: list[tuple[int, int]] = []  # of each slot: its chunk and its number there
        self._epoch = 0  # how often slots changed hands
        self._active: Counter[Plan] = Counter()
        self._hits = self._misses = self._evictions = self._dropped = self._uncached = 0
        for layer, kept in zip(self._layers, self._kept, strict=True):
            layer.weight_cache = kept  # type: ignore[assignment]

    def stats(self) -> CacheStatistics:
        """The counts since the cache was made."""
        with self._lock:
            held = sum(t.nbytes for p in self._projections for t in p.chunks.values())
            return CacheStatistics(
                self._hits, self._misses, self._evictions, self._dropped, self._uncached, len(self._slots), held
            )

    def clear(self) -> None:
        """Forgets all weights and gives their memory back."""
        with self._lock:
            self._slots.clear()
            self._places = []
            self._epoch += 1
            for p in self._projections:
                p.chunks, p.made = {}, set()

    def close(self) -> None:
        """Ends it: layers compute as before, its memory is given back."""
        for layer, kept in zip(self._layers, self._kept, strict=True):
            if vars(layer).get("weight_cache") is kept:
                del layer.weight_cache
        self.clear()

    def __enter__(self) -> WeightCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count_uncached(self) -> None:
        with self._lock:
            self._uncached += 1

    def _project(
        self, projection: _Projection, base: Base, bilinear: Any, x: Tensor, context: Tensor, index: Tensor | None
    ) -> Tensor | None:
        batch = self._batches.of(context, index, len(x))
        with self._lock:
            plan = None if batch is None else self._plan(batch)
            if plan is None:
                self._uncached += 1
                return None
            self._fill(projection, plan, batch, base, bilinear, context)
            chunks = projection.chunks
            self._active[plan] += 1
        try:
            return project(x, plan, chunks, projection.d_out)
        finally:
            with self._lock:
                self._active[plan] -= 1
                if not self._active[plan]:
                    del self._active[plan]

    def _plan(self, batch: Batch) -> Plan | None:
        """The slots of a batch, given to it where it has none; None where there is no room."""
        if batch.epoch != self._epoch or batch.plan is None:
            missing = [key for key in batch.rows if key not in self._slots]
            free = self._free(batch, len(missing)) if missing else []
            if free is None:
                return None
            for key, slot in zip(missing, free, strict=True):
                self._slots[key] = slot
            if missing:
                self._epoch += 1
            batch.plan = plan_of(batch, [self._slots[key] for key in batch.rows], self._places)
            batch.epoch = self._epoch
        for key in batch.rows:
            self._slots.move_to_end(key)
        return batch.plan

    def _free(self, batch: Batch, count: int) -> list[int] | None:
        """Slots for `count` contexts more; those that a call reads or the batch has stay."""
        taken = set(self._slots.values())
        free = [slot for slot in range(len(self._places)) if slot not in taken]
        room = self.max_contexts - len(self._places)
        if len(free) < count and room:
            new = min(max(count - len(free), _CHUNK), room)
            number = self._places[-1][0] + 1 if self._places else 0
            free += range(len(self._places), len(self._places) + new)
            self._places += [(number, i) for i in range(new)]
        if len(free) < count:
            busy = {slot for plan in self._active for slot in plan.slots}
            oldest = [key for key, slot in self._slots.items() if key not in batch.rows and slot not in busy]
            if len(oldest) < count - len(free):
                return None
            for key in oldest[: count - len(free)]:
                slot = self._slots.pop(key)
                self._evictions += 1
                free.append(slot)
                for p in self._projections:
                    p.made.discard(slot)
        return sorted(free[:count])

    def _fill(self, p: _Projection, plan: Plan, batch: Batch, base: Base, bilinear: Any, context: Tensor) -> None:
        """Makes what the projection has not of the batch's weights."""
        values, scales = parts(bilinear)
        tensors = [t for t in (base.parameter, values, scales) if t is not None]
        if p.stamp is None or not p.stamp.holds(tensors):
            self._dropped += len(p.made)
            p.made, p.stamp = set(), Stamp(tensors)
        missing = plan.slots - p.made
        self._hits += len(plan.slots) - len(missing)
        self._misses += len(missing)
        if not missing:
            return
        at = {self._slots[key]: row for key, row in batch.rows.items() if self._slots[key] in missing}
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(context.device.type, enabled=False):
            table = context.detach().index_select(0, torch.tensor(list(at.values()), device=context.device))
            table = table.to(wide_dtype(base.weight, context, values))
            for number in {self._places[slot][0] for slot in at}:
                chunk = p.chunks.get(number)
                if chunk is None or chunk.device != context.device:
                    slots = sum(place[0] == number for place in self._places)
                    p.chunks[number] = torch.empty(slots, p.d_in, p.d_out, dtype=p.dtype, device=context.device)
            for rows, made in blocks(base.weight, values, scales, table, _MAKING):
                for slot, each in zip(at, made, strict=True):
                    number, i = self._places[slot]
                    p.chunks[number][i, rows] = each
        p.made |= missing


def cache_weights(model: nn.Module, max_bytes: int = 1 << 30, *, dtype: torch.dtype | None = None) -> WeightCache:
    """Keeps the weights that a model's layers make for contexts, for inference over contexts that come again.

        with ctxkern.cache_weights(model) as cache, ctxkern.use(model, context=table, context_index=files):
            model.generate(**prompts)
        print(cache.stats())

    A context is known by its values: the same row in another table or batch is found again, a changed one is made anew.
    So is every weight whose parameters changed: were replaced, moved or written to, as an optimizer or load_state_dict
    does it; what is written through `.data` alone goes unseen, and `cache.clear()` forgets all. The weights of one
    context stay or go together, in all layers; the least recently used make room for others. All threads share them.

    Args:
        model: a module with layers of `attach_contexts`, ModulatedLinear or ContextModulatedAttention. Layers with
            factors (`rank=`) stay as they are: their weights would be more to read than the factors.
        max_bytes: that the kept weights take at most. Of a batch of more contexts than fit into it, nothing is kept.
        dtype: of the kept weights, which are made in float32 or wider and rounded once; None: that of each layer's
            weight. Calls with x in another dtype are computed without the cache: under autocast, give its dtype.

    Returns:
        A `WeightCache`, with `stats()`, `clear()` and `close()`.

    Calls are computed without the cache, with the same result, wherever gradients are enabled and x, the context or a
    parameter requires one; under torch.compile, torch.export and torch.func; with packed sequences (`cu_seqlens`), a
    context per token, a layer that names its backend, or parameters made under torch.inference_mode. On a GPU the
    values of a table and an index are read to the host when they change, and one stream at a time may run the model.

    Raises:
        TypeError: an argument of another type. ValueError: a model with no layer whose weights can be kept, a layer
        that has a cache, or max_bytes below the weights of one context.

    Example:
        >>> layer = ModulatedLinear(8, 6, context_dim=4)
        >>> x, table = torch.randn(3, 5, 8), torch.randn(3, 4)
        >>> with cache_weights(layer) as cache, torch.no_grad():
        ...     y = layer(x, table), layer(x, table)
        ...     cache.stats()[:2]
        (3, 3)
    """
    op = "cache_weights"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
        raise TypeError(f"{op}: max_bytes is a {type(max_bytes).__name__}; it must be an int")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}; it must be None or a dtype of floats")
    layers = {name: module for name, module in model.named_modules() if _projections(module, dtype)}
    if not layers:
        raise ValueError(
            f"{op}: model has no layer whose weights can be kept; it must have one of attach_contexts, a "
            "ModulatedLinear or a ContextModulatedAttention, with a whole bilinear tensor"
        )
    for name, layer in layers.items():
        if layer.weight_cache is not None:
            raise ValueError(f"{op}: layer {name!r} has a cache; that one must be closed first")
    return WeightCache(layers, max_bytes, dtype)


def _projections(layer: nn.Module, dtype: torch.dtype | None) -> dict[str, _Projection]:
    found = {}
    for name in getattr(layer, "bilinear_names", ()):
        bilinear = getattr(layer, name)
        if isinstance(bilinear, Tensor | Int8Bilinear):
            found[name] = _Projection(bilinear, layer.base_of(name), dtype)  # type: ignore[operator]
    return found


_PLAIN = (Tensor, nn.Parameter)


def kept(
    layer: Any,
    name: str,
    x: Tensor,
    context: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    repeats: bool = False,
) -> Tensor | None:
    """y [B, S, E] of x [B, S, D] by kept weights; None where the call must be computed, or has something to refuse.

    name: of the bilinear tensor. index: [b], or None for rows of `context` in order. repeats: whether each may stand
    for several sequences of x, B / b of them.
    """
    if torch.compiler.is_compiling() or layer.weight_cache is None:
        return None
    cache, projection = layer.weight_cache.cache, layer.weight_cache.projections.get(name)
    if projection is None or not isinstance(x, Tensor) or not isinstance(context, Tensor):
        return None
    base, bilinear = layer.base_of(name), getattr(layer, name)
    parameters = (base.parameter, *parts(bilinear))
    dtype = x.dtype
    if autocast_enabled(x) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    given = [t for t in (x, context, index, bias, *parameters) if t is not None]
    if (
        cu_seqlens is not None
        or any(type(t) not in _PLAIN for t in given)
        or takes_reference()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        or any(t is not None and t.is_inference() for t in parameters)
        or dtype is not projection.dtype
        or x.dtype not in FLOATS
        or not mixes(context.dtype, dtype)
        or any(t.device != x.device for t in given)
        or context.dim() != 2
        or context.shape[1] != projection.context_dim
        or x.dim() != 3
        or x.shape[2] != projection.d_in
        or not (x.numel() and context.numel() and projection.d_out)
        or not (repeats or len(context if index is None else index) == len(x))
    ):
        cache._count_uncached()
        return None
    y = cache._project(projection, base, bilinear, x.to(dtype), context, index)
    return y if y is None or bias is None else y.add_(bias)

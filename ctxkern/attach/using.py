"""What the attached layers of a model use: set for a `with` block, for each thread, kept for recomputation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn


class Used(NamedTuple):
    """What a forward uses. All None: the model as it was before it was attached to."""

    context: Tensor | None = None  # [F, K] or [B, S, K]
    context_index: Tensor | None = None  # [B] int64
    adapter_index: Tensor | None = None  # [B] int64
    lora: Mapping[str, tuple[Tensor, Tensor]] | None = None
    cu_seqlens: Tensor | None = None  # [B + 1] int32
    dropout: float = 0.0
    seeds: Mapping[str, Tensor] | None = None  # of each layer's mask


class Slot(threading.local):
    """Where the attached layers of one model find what they use; None outside of `use`. A copy begins with None."""

    used: Used | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Slot, ()


@dataclass
class Attached:
    """Of a layer: its name in the model, where it finds what it uses, its class before, what of it was added."""

    name: str
    slot: Slot
    plain: type[nn.Module]
    added: tuple[str, ...]  # parameters, buffers and modules
    alpha: float | None = None


class _Active(threading.local):
    def __init__(self) -> None:
        self.slots: list[Slot] = []


_active = _Active()


class use:  # noqa: N801
    """The contexts or adapters that the attached layers of a model use, within a `with` block.

        with ctxkern.use(model, context=table, context_index=files):
            loss = model(**batch).loss
        loss.backward()

    Blocks nest, of one model and of several; the inner one counts. Each thread has its own. What a forward used is used
    again when activation checkpointing runs it again, outside of the block too. Where a batch was expanded, as
    `generate` does for beams and several sequences, every row of the index stands for as many rows of the batch as the
    expansion made of it. Within the block, `torch.compile` compiles once for all values.

    Args:
        model: a module that was attached to, or one that holds such modules, compiled or wrapped ones too.
        context: [F, K] or, a context per token, [B, S, K], for layers of `attach_contexts`.
        context_index: [B] int64, the row of `context` of each sequence; None: F == B, in order.
        adapter_index: [B] int64, the adapter of each sequence, −1 for none, for layers of `attach_adapters`.
        lora: {name of a layer: (A [B, r, D], B [B, E, r])}, weights of a hypernetwork, in place of the bank; layers
            that it does not name are as they were. With adapter_index, whose rows pick among those.
        cu_seqlens: [B + 1] int32, the bounds of the sequences where the model gets them packed, as one row.
        dropout: at least 0 and below 1, the share of an adapter's input that it does not see, as in `lora_linear`. The
            masks are drawn where the block is entered, from torch's generator, one for each layer: the forwards within
            it, and what checkpoints run again, have the same.

        Layers for whose kind nothing is given compute what they did before they were attached to.

    Raises:
        TypeError: an argument of another type. ValueError: a model without attached layers, or without those of the
        kind that something is given for, an index without contexts or of another shape, a name in `lora` that no layer
        with adapters has, or a dropout out of bounds.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> attach_adapters(model, n_adapters=3, rank=2, targets=["0", "2"])
        ['0', '2']
        >>> with use(model, adapter_index=torch.tensor([0, 2, -1])):
        ...     model(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        context: Tensor | None = None,
        context_index: Tensor | None = None,
        *,
        adapter_index: Tensor | None = None,
        lora: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        cu_seqlens: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        layers = attached_modules("use", model)
        given = {"context": context, "context_index": context_index, "adapter_index": adapter_index}
        for name, t in (*given.items(), ("cu_seqlens", cu_seqlens)):
            if t is not None and not isinstance(t, Tensor):
                raise TypeError(f"use: {name} is a {type(t).__name__}; it must be a tensor or None")
        if context is None and context_index is not None:
            raise ValueError("use: context is None; it must be a tensor where context_index is given")
        adapted = [layer.attached.name for layer in layers if "lora_A" in layer.attached.added]
        for kind, there, names in (
            ("contexts", len(adapted) < len(layers), ("context",)),
            ("adapters", bool(adapted), ("adapter_index", "lora")),
        ):
            for name in names:
                if not there and (given | {"lora": lora})[name] is not None:
                    raise ValueError(f"use: {name} is given and no layer of attach_{kind} is there; it must be None")
        if adapter_index is not None and adapter_index.dim() != 1:
            raise ValueError(f"use: adapter_index has shape {list(adapter_index.shape)}; it must be [B]")
        for name, pair in ({} if lora is None else lora).items():
            if name not in adapted:
                raise ValueError(f"use: lora has {name!r}; it must name layers of attach_adapters, as {adapted[0]!r}")
            if not isinstance(pair, (tuple, list)) or [getattr(t, "ndim", 0) for t in pair] != [3, 3]:
                raise TypeError(f"use: lora has something else than A [B, r, D] and B [B, E, r] for {name!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"use: dropout is {dropout!r}; it must be a number of at least 0 and below 1")
        self._used = Used(context, context_index, adapter_index, lora, cu_seqlens, float(dropout))
        self._layers = layers
        self._slots = list(dict.fromkeys(layer.attached.slot for layer in layers))
        self._entered: list[ExitStack] = []

    def __enter__(self) -> use:
        used = self._used
        if used.dropout:
            # on the CPU: the same masks on every device
            drawn = torch.randint(2**62, (len(self._layers), 1))
            used = used._replace(seeds={layer.attached.name: s for layer, s in zip(self._layers, drawn, strict=True)})
        with ExitStack() as stack:
            for slot in self._slots:
                stack.enter_context(_Using(slot, used))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *reason: Any) -> None:
        self._entered.pop().close()


class _Using:
    """A slot with a value, on this thread."""

    def __init__(self, slot: Slot, used: Used | None) -> None:
        self.slot, self.used = slot, used

    def __enter__(self) -> None:
        self.before = self.slot.used
        self.slot.used = self.used
        _active.slots.append(self.slot)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.slots.pop()
        self.slot.used = self.before


def is_attached(module: nn.Module) -> bool:
    """Whether something is attached to this very module."""
    return isinstance(getattr(module, "attached", None), Attached)


def attached_modules(op: str, model: nn.Module) -> list[Any]:
    """The attached layers of a model.

    Raises:
        TypeError: model is no module. ValueError: it has no attached layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    found = [module for module in model.modules() if is_attached(module)]
    if not found:
        raise ValueError(f"{op}: model has no attached layer; attach_contexts or attach_adapters must come first")
    return found


def attached_layers(op: str, model: nn.Module) -> dict[str, Any]:
    """{name at attachment: layer} of them.

    Raises:
        As `attached_modules`, and ValueError where two have one name, as parts of the model were attached to alone.
    """
    found: dict[str, Any] = {}
    for layer in attached_modules(op, model):
        name = layer.attached.name
        if name in found:
            raise ValueError(f"{op}: two layers were attached as {name!r}, in parts of the model; {op} takes one part")
        found[name] = layer
    return found


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what is in use now, whenever and on whatever thread it runs."""
    held = [(slot, slot.used) for slot in dict.fromkeys(_active.slots)]
    if not held:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for slot, used in held:
                stack.enter_context(_Using(slot, used))
            return function(*args, **kwargs)

    return run


def remember_in_checkpoints() -> None:
    """Lets torch.utils.checkpoint recompute under what a forward used; it has no hook for that that both kinds call."""
    plain, reentrant = checkpointing._checkpoint_without_reentrant_generator, checkpointing.CheckpointFunction
    if getattr(plain, "remembers_use", False):
        return

    def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(_bound(fn), *args, **kwargs)

    class Remembering(reentrant):  # type: ignore[valid-type, misc]
        @staticmethod
        def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.forward(ctx, _bound(run_function), *args)

    generator.remembers_use = True  # type: ignore[attr-defined]
    Remembering.__name__ = reentrant.__name__
    checkpointing._checkpoint_without_reentrant_generator = generator  # type: ignore[assignment]
    checkpointing.CheckpointFunction = Remembering  # type: ignore[misc]

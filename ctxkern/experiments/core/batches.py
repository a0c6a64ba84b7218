"""Batches of a run: where they come from, how many tokens and rows they have, and the shares of processes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch

Batch = Mapping[str, torch.Tensor]


class BatchSource(Protocol):
    """Endless batches from any step on."""

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """The batches from `start_step` on."""


class StepBatches:
    """The batches `batch_at(step)` of a function."""

    def __init__(self, batch_at: Callable[[int], Batch]):
        self.batch_at = batch_at

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """The batches from `start_step` on."""
        step = start_step
        while True:
            yield self.batch_at(step)
            step += 1


class LoaderBatches:
    """The batches of a `DataLoader` whose `batch_sampler` has `set_epoch(epoch, start_batch)`, epoch after epoch.

    Raises:
        TypeError: the batch sampler has no `set_epoch`.
    """

    def __init__(self, loader: torch.utils.data.DataLoader):
        self.loader, self.sampler = loader, cast(Any, loader.batch_sampler)
        if not hasattr(self.sampler, "set_epoch"):
            kind = type(self.sampler).__name__
            raise TypeError(f"the batch_sampler of loader is a {kind}; it must have a method set_epoch")

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """The batches from `start_step` on."""
        epoch, position = divmod(start_step, len(self.sampler))
        while True:
            self.sampler.set_epoch(epoch, position)
            yield from self.loader
            epoch, position = epoch + 1, 0


def count_tokens(batch: Batch) -> int:
    """The tokens of a batch that are not padding."""
    mask = batch.get("padding_mask")
    return int((~mask).sum()) if mask is not None else next(iter(batch.values())).numel()


def count_rows(batch: Batch) -> int:
    """The sequences of a batch."""
    return len(next(iter(batch.values())))


def deal(batch: Batch, shares: int) -> list[Batch]:
    """The rows of a batch in as many parts, each of neighbours; the last ones are empty where there are fewer rows."""
    if shares == 1:
        return [batch]
    parts = {name: value.tensor_split(shares) for name, value in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(shares)]

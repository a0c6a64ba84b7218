"""Batches that mix files, as a function of (seed, epoch, batch)."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ctxkern.experiments.core.seeding import generator


class MixedFileBatchSampler(Sampler[list[int]]):
    """Batches of indices with two or more distinct files in each, where the data has two and `batch_size` allows it.

    Each file's indices are shuffled and spread evenly over the batches of the epoch. Every index occurs once an epoch,
    except that a file too large for its share of every batch is thinned (`drop_last`) or joined by repeats of other
    files. Stateless: the batches of an epoch depend on `(seed, epoch)` alone, so that a run can start at any batch.

    Args:
        file_ids: the file of each index of the dataset.
        batch_size: the largest batch; the sizes of an epoch differ by at most one unless files are few, and with
            `drop_last` every batch has exactly `batch_size`.
        seed: of the shuffling.
        drop_last: leave a random remainder out.
        balanced: every file gets the same share of every epoch, whatever its size: small files repeat.

    Raises:
        ValueError: no indices; `batch_size` < 1; `drop_last` with fewer indices than `batch_size`.
    """

    def __init__(
        self,
        file_ids: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        balanced: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if len(file_ids) == 0:
            raise ValueError("file_ids is empty; it must have at least one id")
        if drop_last and len(file_ids) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}; with drop_last it must be at most the {len(file_ids)} examples"
            )
        self.batch_size, self.seed, self.drop_last, self.balanced = batch_size, seed, drop_last, balanced
        self.epoch = self.start_batch = 0
        ids = torch.as_tensor(file_ids, dtype=torch.int64)
        self._groups = [(ids == file_id).nonzero().flatten() for file_id in ids.unique()]
        self._mixing = len(self._groups) > 1 and batch_size > 1
        self._num_batches = self._count()
        self._cached: tuple[int, list[list[int]]] | None = None

    def _count(self) -> int:
        n = sum(map(len, self._groups))
        batches = n // self.batch_size if self.drop_last else -(-n // self.batch_size)
        if self._mixing and not self.balanced:
            # no batch may hold batch_size indices of one file
            largest, room = max(map(len, self._groups)), self.batch_size - 1
            batches = max(batches, largest // room if self.drop_last else -(-largest // room))
        return batches

    def __len__(self) -> int:
        return self._num_batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make iteration give the batches of `epoch` from `start_batch` on."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"epoch is {epoch} and start_batch is {start_batch}; "
                f"they must be at least 0, and start_batch at most {len(self)}"
            )
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch)[self.start_batch :]

    def batch_at(self, step: int) -> list[int]:
        """The batch of `step`, counted over all epochs from 0."""
        epoch, position = divmod(step, len(self))
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, self.batches(epoch)
        return self._cached[1][position]

    def _draw(self, group: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
        """`count` indices of `group` in random order, each repeated as seldom as possible."""
        rounds = max(1, -(-count // len(group)))
        return torch.cat([group[torch.randperm(len(group), generator=rng)] for _ in range(rounds)])[:count]

    def _shares(self, rng: torch.Generator) -> list[int]:
        sizes = [len(group) for group in self._groups]
        if not self.balanced:
            limit = len(self) * (self.batch_size - 1)
            return [min(size, limit) for size in sizes] if self._mixing else sizes
        total = len(self) * self.batch_size if self.drop_last else sum(sizes)
        share, rest = divmod(total, len(sizes))
        extra = set(torch.randperm(len(sizes), generator=rng)[:rest].tolist())
        return [share + (i in extra) for i in range(len(sizes))]

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of `epoch`."""
        rng = generator(self.seed, "batches", epoch)
        count = len(self)
        shares = self._shares(rng)
        drawn = [self._draw(group, share, rng) for group, share in zip(self._groups, shares, strict=True)]
        if self.drop_last:
            drawn = self._fit(drawn, count * self.batch_size, rng)
        order = torch.randperm(len(drawn), generator=rng).tolist()
        dealt = torch.cat([drawn[i] for i in order])
        owner = torch.cat([torch.full((len(drawn[i]),), i) for i in order])
        out = []
        for b in torch.randperm(count, generator=rng).tolist():
            batch, owners = dealt[b::count], owner[b::count]
            if self._mixing and len(owners.unique()) == 1:
                batch = torch.cat([batch, self._borrow(int(owners[0]), rng)])
            out.append(batch[torch.randperm(len(batch), generator=rng)].tolist())
        return out

    def _borrow(self, owner: int, rng: torch.Generator) -> torch.Tensor:
        others = torch.cat([group for i, group in enumerate(self._groups) if i != owner])
        return others[torch.randint(len(others), (1,), generator=rng)]

    def _fit(self, drawn: list[torch.Tensor], total: int, rng: torch.Generator) -> list[torch.Tensor]:
        """Thin or repeat `drawn` to `total` indices."""
        have = sum(map(len, drawn))
        if have > total:
            keep = torch.zeros(have, dtype=torch.bool)
            keep[torch.randperm(have, generator=rng)[:total]] = True
            return [part[mask] for part, mask in zip(drawn, keep.split([len(p) for p in drawn]), strict=True)]
        if have < total:
            # only where one file alone fills its share: the others repeat
            largest = max(range(len(drawn)), key=lambda i: len(drawn[i]))
            others = [i for i in range(len(drawn)) if i != largest]
            pool = torch.cat([drawn[i] for i in others])
            owner = torch.cat([torch.full((len(drawn[i]),), i) for i in others])
            picks = self._draw(torch.arange(len(pool)), total - have, rng)
            for i in others:
                drawn[i] = torch.cat([drawn[i], pool[picks[owner[picks] == i]]])
        return drawn

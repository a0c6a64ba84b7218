"""What a file loses in the contexts of others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.multifile.analysis.measures import interval, sign_flips
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.experiments.multifile.train import autocast, score_rows

OWN = "own"


@dataclass
class Swap:
    """The losses of files in contexts of one kind, next to those in their own.

    Attributes:
        loss, exact: [files], nats per label, and the share of answers that are right everywhere (nan without answers).
        rise: [files], loss less that in the own context; `bounds` [files, 2] are its 95 % interval by a bootstrap over
            windows (nan of a single window).
        mean: of `rise` over files, `low` and `high` its interval by a bootstrap over files.
        p: of `rise` above 0 by sign flips over files: the null is that the own context serves no better.
    """

    loss: Tensor
    exact: Tensor
    rise: Tensor
    bounds: Tensor
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    p: float = 1.0


@dataclass
class Swaps:
    """`Swap` by kind, for the files `files` (ids) that have validation windows; `others` and `nearest` are the ids of
    the files whose contexts they were given."""

    files: list[int]
    windows: list[int]
    others: list[int]
    nearest: list[int]
    kinds: dict[str, Swap] = field(default_factory=dict)


@torch.no_grad()
def scores(model: MultiFileTransformer, config: TrainConfig, batches: Sequence[Batch], table: Tensor) -> Tensor:
    """[windows, 4] float64, see `score_rows`, of batches in order, where the file f has the context `table[f]` [K]."""
    rows = []
    for batch in batches:
        with autocast(config, table.device):
            logits = model(batch["input"], table[batch["file_id"]])
        rows.append(score_rows(logits, batch)[1].double())
    return torch.cat(rows)


def swap_losses(
    model: MultiFileTransformer,
    config: TrainConfig,
    batches: Sequence[Batch],
    contexts: Tensor,
    similarity: Tensor,
    rng: torch.Generator,
    tick: Callable[[], Any] = lambda: None,
) -> Swaps:
    """Validation loss of each file in its own context, another file's at random, the nearest file's, the mean and zero.

    Args:
        model: in evaluation mode.
        config: of the run, for its dtype.
        batches: of `Evaluator`, with `answer`.
        contexts: [F, K], as layers use them.
        similarity: [F, F], by which the nearest file is found.
        rng: of the random file and of intervals.
        tick: called after each kind.
    """
    count = len(contexts)
    apart = similarity.double().clone().fill_diagonal_(-torch.inf)
    nearest = apart.argmax(1)
    # any other file, each as likely
    others = (torch.arange(count) + torch.randint(1, max(2, count), (count,), generator=rng)) % count
    tables = {
        OWN: contexts,
        "another file's": contexts[others],
        "the nearest file's": contexts[nearest],
        "the mean": model.scaled(contexts.mean(0, keepdim=True)).expand(count, -1),
        "zero": torch.zeros_like(contexts),
    }
    ids = torch.cat([batch["file_id"] for batch in batches])
    files = ids.unique().tolist()
    found = Swaps(files, [int((ids == i).sum()) for i in files], others[files].tolist(), nearest[files].tolist())
    own = torch.zeros(0)
    for kind, table in tables.items():
        rows = scores(model, config, batches, table)
        own = rows if kind == OWN else own
        found.kinds[kind] = _compared(rows, own, ids, files, rng)
        tick()
    return found


def _compared(rows: Tensor, own: Tensor, ids: Tensor, files: list[int], rng: torch.Generator) -> Swap:
    parts = [rows[ids == i] for i in files]
    loss = torch.stack([part[:, 0].sum() / part[:, 1].sum() for part in parts])
    exact = torch.stack([part[:, 2].sum() / part[:, 3].sum() for part in parts])
    rises = [(part - own[ids == i])[:, 0] for part, i in zip(parts, files, strict=True)]
    rise = torch.stack([r.sum() / part[:, 1].sum() for r, part in zip(rises, parts, strict=True)])
    bounds = torch.tensor([interval(r, rng, part[:, 1]) for r, part in zip(rises, parts, strict=True)])
    low, high = interval(rise, rng)
    return Swap(loss, exact, rise, bounds, float(rise.mean()), low, high, sign_flips(rise, rng))

"""Attention maps of a model, and whether they differ by file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ctxkern.experiments.multifile.analysis.measures import (
    Null,
    against,
    contrast,
    entropy,
    interval,
    jensen_shannon,
    permuted,
    sign_flips,
)
from ctxkern.experiments.multifile.model import MultiFileTransformer

# queries of a window that are compared, spread over it
_QUERIES = 16
_RANDOM_DRAWS = 3
# nats: what equal maps differ by is below
_ROUNDING = 1e-12


class _Capture(TorchFunctionMode):
    """Sees every call of torch's attention, and lets it compute."""

    def __init__(self, queries: Tensor | None):
        super().__init__()
        self.queries = queries
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.maps.append(_weights(self.queries, *args, **kwargs))
        return func(*args, **kwargs)


def _weights(
    queries: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What a call of torch's attention weighs v with, [B, H, Q, S]."""
    rows = torch.arange(q.shape[-2], device=q.device) if queries is None else queries
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q[..., rows, :] @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows[:, None], float("-inf"))
    if attn_mask is not None:
        mask = attn_mask.expand(*scores.shape[:2], q.shape[-2], -1)[..., rows, :]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1)


@torch.no_grad()
def attention_maps(
    model: MultiFileTransformer, tokens: Tensor, contexts: Tensor | None, *, queries: Tensor | None = None
) -> Tensor:
    """The attention weights of every layer and head: those of the calls of torch's attention that the model makes.

    Args:
        model: in evaluation mode; its layers compute as ever.
        tokens: [B, S] int64.
        contexts: [B, K], or None for a model without contexts.
        queries: [Q] int64, the positions whose maps are wanted; None: all, Q = S.

    Returns:
        [L, B, H, Q, S], in the dtype of q and k; each row is a distribution over the keys.
    """
    with _Capture(queries) as capture:
        model(tokens, contexts)
    return torch.stack(capture.maps)


@dataclass
class Window:
    """Tokens [S] of a validation window without padding, and the id of its file."""

    tokens: Tensor
    file_id: int


def _maps(model: MultiFileTransformer, window: Window, contexts: Tensor) -> Tensor:
    """Maps [F, L · H, Q, S] of a window in each context [F, K]; a query with one key is not asked."""
    length = len(window.tokens)
    queries = torch.arange(1, length)[:: max(1, (length - 1) // _QUERIES)]
    parts = [
        attention_maps(model, window.tokens.expand(len(part), -1), part, queries=queries) for part in contexts.split(16)
    ]
    return torch.cat(parts, 1).transpose(0, 1).flatten(1, 2)


def pairwise_divergence(model: MultiFileTransformer, window: Window, contexts: Tensor) -> Tensor:
    """[F, F] float64: the divergence of the attention maps on one input in two contexts [F, K], mean over layers,
    heads and queries; see `jensen_shannon`."""
    maps = _maps(model, window, contexts).double()
    own = entropy(maps).flatten(1).mean(1)
    out = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    for i in range(len(maps) - 1):
        rest = slice(i + 1, None)
        middle = entropy((maps[i] + maps[rest]) / 2).flatten(1).mean(1)
        out[i, rest] = out[rest, i] = (middle - (own[i] + own[rest]) / 2).clamp(min=0)
    return out


def _from_own(model: MultiFileTransformer, window: Window, contexts: Tensor, own: int) -> float:
    """Mean divergence of the maps in the context `own` from those in all others."""
    maps = _maps(model, window, contexts)
    return float(jensen_shannon(maps[own], maps).flatten(1).mean(1).sum() / (len(maps) - 1))


@dataclass
class Divergence:
    """Whether attention differs by file, on the same inputs. Divergences are in nats, ln 2 at most.

    Attributes:
        pairs: [F, F], of the maps in the contexts of two files, mean over all windows.
        mean: of `pairs` over different files. By itself it proves nothing: an untrained model with large random
            tensors has a large one.
        within, between: over pairs of one family and of two; nan without families.
        families: between − within, and the same with family labels in random order. Its null: which family a file is
            of has nothing to do with attention. Files that are alone count as families of one.
        own: divergence of a file's own context from others less that of others among each other, on the file's own
            windows, mean over files; against the same with the contexts dealt out to the files at random. Its null:
            no context fits the file that it was trained on better than another file's does.
        trained, random: mean over files of the divergence between own and other contexts on the file's windows, as
            trained, and with all contexts replaced by random vectors of the same norms (mean of several draws).
        difference: [files], trained − random; `low` and `high` bound its mean by a bootstrap over files.
        p: of `difference` by sign flips over files. Its null: training has not made contexts spread attention further
            than vectors of no meaning do through the same tensors.
        windows: how many were used.
    """

    pairs: Tensor
    mean: float
    within: float
    between: float
    families: Null | None
    own: Null
    trained: float
    random: float
    difference: Tensor
    low: float
    high: float
    p: float
    windows: int


def divergence(
    model: MultiFileTransformer,
    contexts: Tensor,
    windows: list[Window],
    labels: Tensor,
    permutations: int,
    rng: torch.Generator,
    tick: Callable[[], Any] = lambda: None,
) -> Divergence:
    """The attention of a model in the contexts of its files.

    Args:
        model: in evaluation mode.
        contexts: [F, K], two or more, as layers use them.
        windows: inputs; `file_id` is a row of `contexts`.
        labels: [F] int64, the family of each file.
        permutations: random orders of labels, and of contexts, for p values.
        rng: of everything random.
        tick: called after each window.
    """
    count = len(contexts)
    draws = [_like(contexts, rng) for _ in range(_RANDOM_DRAWS)]
    by_file: dict[int, list[Tensor]] = {}
    trained: dict[int, list[float]] = {}
    random: dict[int, list[float]] = {}
    for window in windows:
        own, pairs = window.file_id, pairwise_divergence(model, window, contexts)
        by_file.setdefault(own, []).append(pairs)
        trained.setdefault(own, []).append(float(pairs[own].sum() / (count - 1)))
        spread = [_from_own(model, window, draw, own) for draw in draws]
        random.setdefault(own, []).append(sum(spread) / len(spread))
        tick()
    files = sorted(by_file)
    # [files, F, F]
    each = torch.stack([torch.stack(by_file[own]).mean(0) for own in files])
    pairs = torch.stack([part for own in files for part in by_file[own]]).mean(0)
    means = [torch.tensor([sum(values[own]) / len(values[own]) for own in files]) for values in (trained, random)]
    difference = (means[0] - means[1]).double()
    difference = torch.where(difference.abs() < _ROUNDING, 0.0, difference)
    same = (labels[:, None] == labels) & ~torch.eye(count, dtype=torch.bool)
    apart = labels[:, None] != labels
    known = bool(same.any() and apart.any())
    low, high = interval(difference, rng)
    return Divergence(
        pairs=pairs,
        mean=float(pairs.sum() / (count * (count - 1))),
        within=float(pairs[same].mean()),
        between=float(pairs[apart].mean()),
        families=permuted(lambda order: contrast(pairs, order), labels, permutations, rng) if known else None,
        own=_own(each, torch.tensor(files), permutations, rng),
        trained=float(means[0].mean()),
        random=float(means[1].mean()),
        difference=difference,
        low=low,
        high=high,
        p=sign_flips(difference, rng),
        windows=len(windows),
    )


def _like(contexts: Tensor, rng: torch.Generator) -> Tensor:
    """Random directions at the norms of contexts [F, K]."""
    drawn = torch.randn(contexts.shape, generator=rng, dtype=torch.float64).to(contexts)
    return F.normalize(drawn) * contexts.norm(dim=1, keepdim=True)


def _own(each: Tensor, files: Tensor, permutations: int, rng: torch.Generator) -> Null:
    count = each.shape[-1]
    # [files, F]: divergence of each context from all others, and from it that of the others among each other
    from_one = each.sum(2) / (count - 1)
    total = each.sum((1, 2))
    rest = (total[:, None] - 2 * each.sum(2)) / max(1, (count - 1) * (count - 2))
    excess = from_one - rest
    rows = torch.arange(len(files))

    def statistic(order: Tensor) -> float:
        return float(excess[rows, order[files]].mean())

    drawn = [statistic(torch.randperm(count, generator=rng)) for _ in range(permutations)]
    return against(statistic(torch.arange(count)), torch.tensor(drawn, dtype=torch.float64))

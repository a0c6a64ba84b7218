"""The numbers of a report, on tensors alone: similarities, neighbours, ranks, and tests by permutation."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# sign flips of so few differences are all tried
_ALL_FLIPS = 12
_DRAWS = 10_000


@dataclass
class Null:
    """A statistic and what it would be without the thing that is asked about.

    `p` is (1 + number of null values ≥ observed) / (1 + number of null values): one-sided, never 0. `mean` and `high`
    are the mean and the 95 % quantile of the null values.
    """

    observed: float
    mean: float
    high: float
    p: float


def against(observed: float, values: Tensor) -> Null:
    """`observed` against null values [n]; equal up to rounding counts as reached."""
    values = values.double()
    close = 1e-12 * max(1.0, abs(observed))
    p = (1 + int((values >= observed - close).sum())) / (1 + len(values))
    return Null(observed, float(values.mean()), float(values.quantile(0.95)), p)


def cosines(products: Tensor) -> Tensor:
    """The cosines [F, F] of vectors with the inner products [F, F]; a vector of zeros has 0 with all others."""
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return scale[:, None] * products * scale


def principal_axes(products: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors with the inner products [F, F] on their first two principal axes: coordinates [F, 2], and the shares [2]
    of the variance that the axes have (classical scaling, which is PCA without the vectors)."""
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    values = values.clamp(min=0)
    places = torch.zeros(len(products), 2, dtype=products.dtype)
    shares = torch.zeros(2, dtype=products.dtype)
    for axis in range(min(2, len(products))):
        places[:, axis] = vectors[:, -1 - axis] * values[-1 - axis].sqrt()
        shares[axis] = values[-1 - axis] / values.sum() if values.sum() > 0 else 0.0
    return places, shares


class Neighbours:
    """The k nearest files of each file, for k = 1 to `most`, by a matrix of similarities [F, F].

    Files that are equally near share the places that are left, so that no order of files is preferred.
    """

    def __init__(self, similarity: Tensor, most: int):
        count = len(similarity)
        apart = similarity.double().clone().fill_diagonal_(-math.inf)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for k in range(1, min(most, count - 1) + 1):
            last = apart.topk(k, dim=1).values[:, -1:]
            # rounding must not tell equal vectors apart
            level = (apart - last).abs() <= 1e-12
            above = (apart > last) & ~level
            room = k - above.sum(1, keepdim=True)
            weight = (above + level * (room / level.sum(1, keepdim=True))) / k
            rows, columns = weight.nonzero(as_tuple=True)
            self.pairs.append((rows, columns, weight[rows, columns]))

    def purity(self, labels: Tensor, k: int | None = None) -> float:
        """The share of a file's nearest files that are of its family, mean over files whose family has two or more.

        Args:
            labels: [F] int64, the family of each file.
            k: how many neighbours, or None for min(3, family size − 1), file by file.

        Returns:
            The mean; nan where no family has two files. Files that are alone in their family have no purity, and are
            neighbours that others can wrongly have.
        """
        sizes = torch.bincount(labels)[labels]
        own = (sizes - 1).clamp(max=3 if k is None else k)
        total = 0.0
        for number, (rows, columns, weights) in enumerate(self.pairs, 1):
            right = (labels[rows] == labels[columns]) & (own[rows] == number)
            total += float(weights[right].sum())
        members = int((sizes > 1).sum())
        return total / members if members else math.nan


def permuted(statistic: Callable[[Tensor], float], labels: Tensor, count: int, rng: torch.Generator) -> Null:
    """`statistic` of labels [F] against itself under `count` random orders of them: the null that families have nothing
    to do with what is measured."""
    values = [statistic(labels[torch.randperm(len(labels), generator=rng)]) for _ in range(count)]
    return against(statistic(labels), torch.tensor(values, dtype=torch.float64))


def sign_flips(differences: Tensor, rng: torch.Generator) -> float:
    """One-sided p value that the mean of paired differences [n] is above 0; 1.0 of none.

    It is the share of sign patterns whose mean is at least as large: of all 2ⁿ patterns up to n = 12, else of 10,000
    random ones and the one observed. The null: each difference is as likely to have either sign.
    """
    values = differences.double()
    if not len(values):
        return 1.0
    if len(values) <= _ALL_FLIPS:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(values))), dtype=torch.float64)
        sums = signs @ values
        return float((sums >= sums[0] - 1e-12 * values.abs().sum()).double().mean())
    signs = torch.randint(2, (_DRAWS, len(values)), generator=rng).double() * 2 - 1
    return against(float(values.sum()), signs @ values).p


def interval(samples: Tensor, rng: torch.Generator, weights: Tensor | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of Σ samples [n] / Σ weights [n] (None: ones), resampling both together;
    (nan, nan) of fewer than two."""
    if len(samples) < 2:
        return math.nan, math.nan
    weights = torch.ones_like(samples) if weights is None else weights
    picks = torch.randint(len(samples), (2000, len(samples)), generator=rng)
    means = samples[picks].double().sum(1) / weights[picks].double().sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def spectrum_ranks(squares: Tensor) -> tuple[float, float]:
    """Effective ranks of a matrix with the squared singular values [K]: the exponential of the entropy of their shares
    (Roy and Vetterli, The effective rank, 2007, there of the values themselves), and the participation ratio
    1 / Σ share². Both are r for r equal values, and nan for a matrix of zeros."""
    shares = squares.double().clamp(min=0)
    if not shares.sum() > 0:
        return math.nan, math.nan
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp()), float(1 / shares.square().sum())


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions along the last axis, in float64."""
    return torch.special.entr(p.double()).sum(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last axis: the entropy of (p + q) / 2 less the mean
    of those of p and q; 0 for equal ones, ln 2 for disjoint ones. In float64.

    Source: Lin, Divergence measures based on the Shannon entropy (1991).
    """
    p, q = p.double(), q.double()
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(min=0)


def contrast(pairs: Tensor, labels: Tensor) -> float:
    """Mean of pairs [F, F] (symmetric) of two families, less the mean of those of one family; nan without both."""
    upper = torch.ones_like(pairs, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels
    within, between = pairs[upper & same], pairs[upper & ~same]
    return float(between.mean() - within.mean()) if len(within) and len(between) else math.nan


def numbered(families: Sequence[str]) -> Tensor:
    """Labels [F] int64 of families by name."""
    order = {name: number for number, name in enumerate(dict.fromkeys(families))}
    return torch.tensor([order[name] for name in families], dtype=torch.int64)


def groups(families: Sequence[str]) -> dict[str, int]:
    """The families of two or more files, with their sizes, large ones first."""
    return {name: count for name, count in Counter(families).most_common() if count > 1}

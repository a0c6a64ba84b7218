"""Intervals of means over things that were measured with several seeds each."""

import torch

from ctxkern.experiments.core.seeding import generator

_DRAWS = 10_000


def interval(differences: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of `differences` [files, seeds], by bootstrap.

    Files are drawn with replacement, and for each one drawn its seeds: the seeds of a file are not independent, so a
    draw over all pairs would be too narrow. The percentiles 2.5 and 97.5 of 10,000 means; of one file and one seed,
    both are the mean.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), 3.8 (hierarchical data).
    """
    files, seeds = differences.shape
    rng = generator(0, "bootstrap")
    rows = torch.randint(files, (_DRAWS, files, 1), generator=rng)
    columns = torch.randint(seeds, (_DRAWS, files, seeds), generator=rng)
    means = differences.double()[rows, columns].mean((1, 2))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

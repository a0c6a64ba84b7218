"""What is drawn: teachers, samples and students, the same on every machine and for every grid."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ctxkern.experiments.core.seeding import generator

# samples that a test set is drawn and measured by
TEST_BLOCK = 1000
_SPREAD = 0.1


def draw_teacher(seed: int, d: int) -> Tensor:
    """q* [d] from N(0, I), float32."""
    return torch.randn(d, generator=generator(seed, "teacher", d))


def draw_samples(seed: int, n: int, d: int, sigma: float, *, apart: bool = False) -> Tensor:
    """x [n, 2, d] from N(0, σ²), float32. Fewer samples are the first ones of more, unless they are drawn `apart`."""
    source = generator(seed, "train", d, n) if apart else generator(seed, "train", d)
    # entry by entry, whatever n: torch draws 16 entries and more in another order
    return torch.stack([torch.randn(2, d, generator=source) for _ in range(n)]) * sigma


def draw_tests(seeds: Sequence[int], n: int, d: int, sigma: float) -> Iterator[Tensor]:
    """Blocks [S, at most TEST_BLOCK, 2, d] of n samples that no training set has."""
    sources = [generator(seed, "test", d) for seed in seeds]
    for start in range(0, n, TEST_BLOCK):
        size = min(TEST_BLOCK, n - start)
        yield torch.stack([torch.randn(size, 2, d, generator=source) for source in sources]) * sigma


def draw_student(seed: int, init: str, q_star: Tensor, rank: int) -> Tensor:
    """Qᵀ [r, d] to begin with, float32.

    `semantic`: q*. `positional`: 1_d / √d. `random`: entries from N(0, 0.1²). The columns after the first, which the
    teacher has none of, are random: at zero they would stay there.
    """
    d = len(q_star)
    query = torch.randn(rank, d, generator=generator(seed, "student", d)) * _SPREAD
    if init == "semantic":
        query[0] = q_star
    elif init == "positional":
        query[0] = d**-0.5
    return query

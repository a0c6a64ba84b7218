"""Learning rates over a run, and when it has stopped to improve: functions of the step and of the validation losses."""

import math
from collections.abc import Iterable

import torch


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor of the learning rate at `step`: linear over `warmup` steps, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def without_improvement(means: Iterable[float | None], least: float = 0.0) -> int:
    """How many of the last means were not lower than the lowest before by the share `least` of it; None is no mean."""
    lowest, later = math.inf, 0
    for mean in means:
        if mean is not None:
            lower = mean < lowest * (1 - least)
            lowest, later = (mean, 0) if lower else (lowest, later + 1)
    return later


class Plateau:
    """The factor of the learning rate that torch's `ReduceLROnPlateau` has reached after some means.

    Args:
        patience: means in a row that may be no improvement; None: the factor stays 1.
        factor: what each plateau multiplies it by.
        least: the share by which a mean must be lower to be an improvement.
    """

    def __init__(self, patience: int | None, factor: float, least: float):
        self._rate = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self._schedule = None
        if patience is not None:
            # eps: learning rates may be as small as they are
            self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self._rate, factor=factor, patience=patience, threshold=least, eps=0.0
            )

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return self._rate.param_groups[0]["lr"]

    def add(self, mean: float | None) -> bool:
        """Count one more mean; whether the factor is lower for it."""
        before = self.factor
        if self._schedule is not None and mean is not None:
            self._schedule.step(mean)
        return self.factor < before

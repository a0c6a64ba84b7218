"""The same training step with the fused and the einsum attention."""

import statistics
import time
from dataclasses import dataclass

import torch

from ctxkern.experiments.multifile.train import Job, build_optimizer


@dataclass
class StepTimes:
    """Median seconds of a training step, and the difference of the losses at equal weights."""

    fused: float
    einsum: float
    loss_difference: float

    @property
    def ratio(self) -> float:
        """Einsum over fused."""
        return self.einsum / self.fused


def time_against_einsum(job: Job, *, steps: int = 5) -> StepTimes:
    """Time `steps` training steps of each kind, interleaved, from the job's weights; the job's model stays as it is.

    Both start from equal weights and fresh optimizers and see the same batches; one step before them is not counted.
    """
    runs: dict[str, tuple] = {}
    for kind in ("fused", "einsum"):
        model = job.model.with_attention(kind)
        runs[kind] = (model, build_optimizer(model, job.config), [], [])
    for step in range(steps + 1):
        batch = {name: value.to(job.device) for name, value in job.batch_at(step).items()}
        # each goes first as often as the other
        for kind in sorted(runs, reverse=bool(step % 2)):
            model, optimizer, seconds, losses = runs[kind]
            torch.manual_seed(step)
            _synchronize(job.device)
            began = time.perf_counter()
            loss = job.loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            _synchronize(job.device)
            seconds.append(time.perf_counter() - began)
            losses.append(loss.item())
    medians = {kind: statistics.median(seconds[1:]) for kind, (_, _, seconds, _) in runs.items()}
    first = [losses[0] for _, _, _, losses in runs.values()]
    return StepTimes(**medians, loss_difference=abs(first[0] - first[1]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

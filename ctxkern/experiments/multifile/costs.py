"""The same training step without context, with the fused and with the einsum attention: time and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import ctxkern
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.experiments.multifile.train import Job, build_optimizer
from ctxkern.testing.measure import peak_extra_bytes

KINDS = ("no context", "ctxkern", "einsum")


@dataclass
class StepCosts:
    """Of a training step by kind: median seconds, and peak bytes beyond what is held before it; `loss_difference` is
    that of ctxkern and the einsum at equal weights."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    loss_difference: float


def without_context(model: MultiFileTransformer) -> MultiFileTransformer:
    """A copy whose projections are plain linear layers with the base weights, to be trained."""
    plain = ctxkern.merge(model, torch.zeros_like(model.contexts()[:1]))
    return plain.requires_grad_(True).train(model.training)


def step_costs(job: Job, *, steps: int = 5) -> StepCosts:
    """Measure `steps` training steps of each kind, interleaved, from the job's weights; the job's model stays as it is.

    All start from equal weights and fresh optimizers and see the same batches; one step before them is not counted.
    """
    models = (without_context(job.model), *(job.model.with_attention(kind) for kind in ("fused", "einsum")))
    runs = {kind: _stepper(job, model) for kind, model in zip(KINDS, models, strict=True)}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(steps + 1):
        # each goes first as often as the others
        for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
            began = time.perf_counter()
            losses[kind].append(runs[kind](number))
            seconds[kind].append(time.perf_counter() - began)
    peaks = {kind: peak_extra_bytes(lambda kind=kind: runs[kind](steps + 1), job.device) for kind in KINDS}
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    return StepCosts(medians, peaks, abs(losses["ctxkern"][0] - losses["einsum"][0]))


def _stepper(job: Job, model: MultiFileTransformer) -> Callable[[int], float]:
    """A step of a number, with its loss; done when it returns."""
    optimizer = build_optimizer(model, job.config)

    def step(number: int) -> float:
        batch = {name: value.to(job.device) for name, value in job.batch_at(number).items()}
        torch.manual_seed(number)
        loss = job.loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        return loss.item()

    return step

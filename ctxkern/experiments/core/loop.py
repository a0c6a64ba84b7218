"""The training loop: progress, logs, validation, checkpoints, and a resume that ends in the same bits.

All randomness of a step is seeded from `(seed, step)`, batches are a function of the step, and the checkpoint holds
model, optimizer and step: so a run that was killed and resumed computes what an uninterrupted one computes.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from ctxkern.experiments.core import checkpoint as ckpt
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import remove_leftovers
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.runlog import RunLog
from ctxkern.experiments.core.seeding import derive_seed

Batch = Mapping[str, torch.Tensor]


class TrainingError(RuntimeError):
    """Training cannot continue: the loss or its gradient is not finite."""


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


@dataclass
class LoopConfig:
    """Settings of `fit`.

    Attributes:
        steps: the step to train to.
        run_dir: folder of logs and checkpoints, made where absent.
        seed: of everything random in a step.
        grad_clip: largest norm of all gradients together; None does not clip.
        log_every, eval_every, checkpoint_every: steps between; None: at the end only.
        config: JSON-able; a checkpoint of another `config` is refused.
        resume: continue from the last checkpoint, or from the start where there is none.
        progress: a bar on a terminal, a line per evaluation.
    """

    steps: int
    run_dir: str | Path
    seed: int = 0
    grad_clip: float | None = 1.0
    log_every: int | None = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    config: Mapping = field(default_factory=dict)
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; it must be above 0, or None")


@dataclass
class FitResult:
    """How a call of `fit` ended.

    `step` of `steps` are done; `interrupted` is the signal that ended it early, or None; `first` and `last`
    are the validation losses by name of the first and the last evaluation (empty without one); `best_loss` is the
    lowest mean of an evaluation, at `best_step`.
    """

    step: int
    steps: int
    interrupted: signal.Signals | None = None
    best_step: int | None = None
    best_loss: float | None = None
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor of the learning rate at `step`: linear over `warmup` steps, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class _Signals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as if unhandled."""

    def __enter__(self) -> "_Signals":
        self.received: signal.Signals | None = None
        self._before = {}
        # handlers can be set in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _count_tokens(batch: Batch) -> int:
    mask = batch.get("padding_mask")
    return int((~mask).sum()) if mask is not None else next(iter(batch.values())).numel()


class _Run:
    """One call of `fit`: its arguments, its logs, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: BatchSource | Callable[[int], Batch],
        config: LoopConfig,
        loss_fn: Callable[[nn.Module, Batch], torch.Tensor],
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
        lr_factor: Callable[[int], float],
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.batches = batches if hasattr(batches, "iterate") else StepBatches(batches)
        self.loss_fn, self.evaluate_fn, self.lr_factor = loss_fn, evaluate, lr_factor
        self.run_dir = Path(config.run_dir)
        self.device = next(model.parameters()).device
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.result = FitResult(0, config.steps)
        self.pending: list[tuple[int, float, torch.Tensor]] = []
        self.saved_step: int | None = None
        self.latest_loss = math.nan
        self.run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.run_dir)
        if config.resume and (self.run_dir / ckpt.LAST).exists():
            self._restore()

    def _restore(self) -> None:
        result, path = self.result, self.run_dir / ckpt.LAST
        state = ckpt.load_checkpoint(path, self.model, self.optimizer, config=self.config.config)
        if state.step > self.config.steps:
            raise ckpt.CheckpointError(
                f"steps is {self.config.steps}; it must be at least {state.step}, the step of {printable(path)}"
            )
        result.step = self.saved_step = state.step
        result.best_step, result.best_loss = state.extra["best_step"], state.extra["best_loss"]

    def _save(self) -> None:
        self._flush()
        result = self.result
        extra = {"best_step": result.best_step, "best_loss": result.best_loss}
        ckpt.save_checkpoint(
            self.run_dir / ckpt.LAST, self.model, self.optimizer,
            step=result.step, config=self.config.config, extra=extra,
        )  # fmt: skip
        self.saved_step = result.step

    def _flush(self) -> None:
        """Write the rows of the steps since the last flush: one device synchronisation for all of them."""
        if self.pending:
            steps, lrs, values = zip(*self.pending, strict=True)
            self.pending.clear()
            for step, lr, (loss, norm) in zip(steps, lrs, torch.stack(values).tolist(), strict=True):
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise TrainingError(
                        f"step {step}: the loss is {loss}, its gradient norm {norm}: lower the learning rate "
                        f"(checkpoints in {printable(self.run_dir)} are from before)"
                    )
                row = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
                self.log.write(row, {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr})
                self.latest_loss = loss
        self.log.flush()

    def _evaluate(self) -> None:
        if self.evaluate_fn is None:
            return
        self._flush()
        result, training = self.result, self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = self.evaluate_fn(self.model)
        self.model.train(training)
        # JSON has no nan
        values = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
        finite = [loss for loss in values.values() if loss is not None]
        mean = sum(finite) / len(finite) if finite else None
        scalars = {f"validation/{name}": loss for name, loss in values.items() if loss is not None}
        if mean is not None:
            scalars["validation_mean"] = mean
        self.log.write({"step": result.step, "mean": mean, "validation": values}, scalars)
        self.log.flush()
        if mean is not None and (result.best_loss is None or mean < result.best_loss):
            result.best_step, result.best_loss = result.step, mean
            path = self.run_dir / ckpt.BEST
            ckpt.save_checkpoint(path, self.model, step=result.step, config=self.config.config, extra={"mean": mean})
        if mean is not None and self.config.progress:
            self.bar.write(f"step {result.step}: mean validation loss {mean:.4f}")

    def _step(self, batch: Batch) -> None:
        result = self.result
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(derive_seed(self.config.seed, "step", result.step))
        factor = self.lr_factor(result.step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        loss = self.loss_fn(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        self.optimizer.step()
        result.step += 1
        self.pending.append((result.step, self.base_lrs[0] * factor, torch.stack([loss.detach(), norm]).double()))

    def _due(self, every: int | None) -> bool:
        step = self.result.step
        return step == self.config.steps or (every is not None and step % every == 0)

    def _train(self, signals: _Signals) -> None:
        config, result = self.config, self.result
        tokens, began = 0, time.perf_counter()
        for batch in self.batches.iterate(result.step):
            if signals.received:
                return
            tokens += _count_tokens(batch)
            self._step(batch)
            self.bar.update()
            if self._due(config.log_every):
                self._flush()
                rate = tokens / (time.perf_counter() - began)
                self.bar.set_postfix_str(f"loss {self.latest_loss:.3f}, {rate:,.0f} tokens/s")
            if self._due(config.eval_every):
                self._evaluate()
            if self._due(config.checkpoint_every):
                self._save()
            if result.step == config.steps:
                return

    def run(self) -> FitResult:
        """Train to the end, or to a signal."""
        result = self.result
        tqdm = require("tqdm").tqdm
        self.log = RunLog(self.run_dir, result.step)
        self.model.train()
        # None: a bar on terminals only
        disable = None if self.config.progress else True
        self.bar = tqdm(total=result.steps, initial=result.step, unit="step", dynamic_ncols=True, disable=disable)
        try:
            with self.bar, _Signals() as signals:
                if result.step == 0:
                    self._evaluate()
                if result.step < result.steps:
                    self._train(signals)
                if result.step < result.steps:
                    result.interrupted = signals.received
                if self.saved_step != result.step:
                    self._save()
        finally:
            self.log.close()
        rows = [row["validation"] for row in self.log.rows if "validation" in row]
        if rows:
            result.first, result.last = (
                {name: math.nan if loss is None else loss for name, loss in row.items()} for row in (rows[0], rows[-1])
            )
        return result


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: BatchSource | Callable[[int], Batch],
    config: LoopConfig,
    *,
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor],
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    lr_factor: Callable[[int], float] = lambda step: 1.0,
) -> FitResult:
    """Train `model` to `config.steps` steps and leave logs and checkpoints in `config.run_dir`.

    Writes `last.safetensors` every `checkpoint_every` steps, at the end, and on SIGINT or SIGTERM (which end the
    call early; a second one acts at once); `best.safetensors` at the lowest mean validation loss; `metrics.jsonl`,
    a row per step and a row per evaluation; TensorBoard events in `logs`. A resumed run ends in the same bits as one
    that was never stopped, given the same machine, thread count and arguments.

    Args:
        model: trained in place, on the device of its first parameter.
        optimizer: over parameters of `model`; each group's `lr` is multiplied by `lr_factor(step)`.
        batches: a function of the step, counted from 0, or an object with `iterate(start_step)`. Batches are mappings
            of tensors and are moved to the model's device.
        config: the settings.
        loss_fn: `(model, batch)` to a scalar; torch's random draws in it are seeded from `(seed, step)`.
        evaluate: `(model)`, in eval mode without gradients, to a loss by name (nan: no data); called before the first
            step, every `eval_every` steps and after the last.

    Raises:
        CheckpointError: see `load_checkpoint`; the run is past `steps`.
        TrainingError: the loss or its gradient is not finite; the checkpoint of before stays.
    """
    return _Run(model, optimizer, batches, config, loss_fn, evaluate, lr_factor).run()

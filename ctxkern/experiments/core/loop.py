"""The training loop: progress, logs, validation, checkpoints, and a resume that ends in the same bits.

All randomness of a step is seeded from `(seed, step)`, batches are a function of the step, and the checkpoint holds
model, optimizer and step: so a run that was killed and resumed computes what an uninterrupted one computes. Several
processes, and accumulation, take shares of the rows of each batch, and so compute what one process computes, in other
sums; accelerate brings devices, DDP and FSDP2.
"""

import contextlib
import enum
import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ctxkern.experiments.core import checkpoint as ckpt
from ctxkern.experiments.core import processes
from ctxkern.experiments.core.batches import Batch, BatchSource, StepBatches, count_rows, count_tokens, deal
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import remove_leftovers
from ctxkern.experiments.core.modes import eval_mode
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.runlog import RunLog
from ctxkern.experiments.core.schedule import Plateau, without_improvement
from ctxkern.experiments.core.seeding import derive_seed
from ctxkern.experiments.core.signals import Signals


class TrainingError(RuntimeError):
    """Training cannot continue: the loss or its gradient is not finite."""


class Next(enum.Enum):
    """What `before_step` wants: go on, write a checkpoint first, or end the run."""

    STEP, SAVE, STOP = range(3)


@dataclass
class LoopConfig:
    """Settings of `fit`.

    Attributes:
        steps: the step to train to.
        run_dir: folder of logs and checkpoints, made where absent.
        seed: of everything random in a step.
        grad_clip: largest norm of all gradients together; None does not clip.
        accumulate: into how many parts the rows of a batch are dealt in each process, one backward each.
        log_every, eval_every, checkpoint_every: steps between; None: at the end only.
        patience: evaluations in a row without a lower mean that end the run; None: none do.
        min_improvement: the share by which a mean must be below the lowest to count as lower, for `patience` and
            `plateau_patience`.
        plateau_patience: evaluations in a row without a lower mean after which, at the next one without, the learning
            rate is multiplied by `plateau_factor`, as by torch's `ReduceLROnPlateau`; None: never.
        plateau_factor: above 0 and below 1.
        max_minutes: ends the run when so many have passed since its start or resume; None: no limit.
        config: JSON-able; a checkpoint of another `config` is refused.
        resume: continue from the last checkpoint, or from the start where there is none.
        progress: a bar on a terminal, a line per evaluation.
        board: folder of TensorBoard's events; None: `logs` in `run_dir`.
    """

    steps: int
    run_dir: str | Path
    seed: int = 0
    grad_clip: float | None = 1.0
    accumulate: int = 1
    log_every: int | None = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    patience: int | None = None
    min_improvement: float = 0.0
    plateau_patience: int | None = None
    plateau_factor: float = 0.1
    max_minutes: float | None = None
    config: Mapping = field(default_factory=dict)
    resume: bool = False
    progress: bool = True
    board: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "eval_every", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; it must be above 0, or None")


@dataclass
class FitResult:
    """How a call of `fit` ended.

    `step` of `steps` are done; `interrupted` is the signal that ended it early, or None; `ended` says what else
    did, or is None; `first`, `best` and `last` are the validation losses by name of the first evaluation, of the one
    with the lowest mean and of the last (empty without one); `best_loss` is that mean, at `best_step`, and
    `observed` what `observe` gave there; `step_seconds` the median time of a step of this call, validation apart (None
    without a step).
    """

    step: int
    steps: int
    interrupted: signal.Signals | None = None
    ended: str | None = None
    best_step: int | None = None
    best_loss: float | None = None
    first: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    observed: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = field(default=None, compare=False)


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
        weigh: Callable[[Batch], float],
        before_step: "Callable[[int], Next] | None",
        observe: Callable[[nn.Module], Mapping[str, float]] | None,
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.weigh, self.before_step, self.observe = weigh, before_step, observe
        self.began = time.monotonic()
        self.batches = batches if hasattr(batches, "iterate") else StepBatches(batches)
        self.loss_fn, self.evaluate_fn, self.lr_factor = loss_fn, evaluate, lr_factor
        self.run_dir = Path(config.run_dir)
        self.device = next(model.parameters()).device
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.main = processes.is_main()
        self.accelerator = processes.accelerator(self.device)
        # as the caller has them, for evaluation and checkpoints; what accelerate makes of them trains
        self.trained, self.stepper = self.accelerator.prepare(model, optimizer)
        self.result = FitResult(0, config.steps)
        self.pending: list[tuple[int, float, torch.Tensor]] = []
        self.saved_step: int | None = None
        self.agreed: signal.Signals | None = None
        self.latest_loss = math.nan
        self.durations: list[float] = []
        self.plateau = Plateau(config.plateau_patience, config.plateau_factor, config.min_improvement)
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.run_dir)
        processes.wait()
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
            step=result.step, config=self.config.config, extra=extra, write=self.main,
        )  # fmt: skip
        processes.wait()
        self.saved_step = result.step

    def _flush(self) -> None:
        """Write the rows of the steps since the last flush: one device synchronisation for all of them."""
        if self.pending:
            steps, lrs, values = zip(*self.pending, strict=True)
            self.pending.clear()
            losses, norms = torch.stack(values).unbind(1)
            losses = self.accelerator.reduce(losses.contiguous(), "sum")
            for step, lr, loss, norm in zip(steps, lrs, losses.tolist(), norms.tolist(), strict=True):
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
        result = self.result
        with eval_mode(self.model), torch.no_grad():
            losses = processes.from_main(self.evaluate_fn(self.model))
            observed = dict(self.observe(self.model)) if self.observe else {}
        # JSON has no nan
        values = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
        finite = [loss for loss in values.values() if loss is not None]
        mean = sum(finite) / len(finite) if finite else None
        scalars = {f"validation/{name}": loss for name, loss in values.items() if loss is not None}
        if mean is not None:
            scalars["validation_mean"] = mean
        scalars |= {f"observed/{name}": value for name, value in observed.items()}
        row = {"step": result.step, "mean": mean, "validation": values}
        self.log.write(row | ({"observed": observed} if observed else {}), scalars)
        self.log.flush()
        if mean is not None and (result.best_loss is None or mean < result.best_loss):
            result.best_step, result.best_loss = result.step, mean
            path = self.run_dir / ckpt.BEST
            ckpt.save_checkpoint(
                path, self.model, step=result.step, config=self.config.config, extra={"mean": mean}, write=self.main
            )
        if mean is not None and self.config.progress and self.main:
            self.bar.write(f"step {result.step}: mean validation loss {mean:.4f}")
        if self.plateau.add(mean) and self.config.progress and self.main:
            self.bar.write(f"step {result.step}: the learning rate is multiplied by {self.config.plateau_factor:g}")

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of the mean loss of a batch; returns what this process adds to the loss."""
        accumulate, count = self.config.accumulate, processes.count()
        shares = deal(batch, accumulate * count)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        whole = self.weigh(batch) if len(shares) > 1 else 1.0
        first = self.accelerator.process_index * accumulate
        for number in range(first, first + accumulate):
            # one process without accumulation draws as it did before there were several
            place = (number,) if number else ()
            torch.manual_seed(derive_seed(self.config.seed, "step", self.result.step, *place))
            here = shares[number]
            if not count_rows(here):
                if count == 1:
                    continue
                # all processes meet in the backward: a row of no weight
                here = {name: value[:1] for name, value in shares[0].items()}
            share = {name: value.to(self.device, non_blocking=True) for name, value in here.items()}
            last = number == first + accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.trained):
                loss = self.loss_fn(self.trained, share)
                if len(shares) > 1:
                    part = self.weigh(here) / whole if here is shares[number] else 0.0
                    total += part * loss.detach()
                    # gradients of processes are averaged, not added
                    loss = loss * (part * count)
                else:
                    total += loss.detach()
                self.accelerator.backward(loss)
        return total

    def _step(self, batch: Batch) -> None:
        result = self.result
        factor = self.lr_factor(result.step) * self.plateau.factor
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        self.stepper.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.stepper.step()
        result.step += 1
        self.pending.append((result.step, self.base_lrs[0] * factor, torch.stack([loss, norm.double()])))

    def _due(self, every: int | None) -> bool:
        step = self.result.step
        return step == self.config.steps or (every is not None and step % every == 0)

    def _ends(self, signals: Signals) -> bool:
        """Whether a signal, or `before_step`, ends the run here."""
        step = self.result.step
        if processes.count() > 1:
            # they agree on a signal where they meet anyway
            if step % (self.config.log_every or 1) == 0:
                numbers = torch.tensor([[int(signals.received or 0), self._is_late()]], device=self.device)
                found, late = self.accelerator.gather(numbers).amax(0).tolist()
                self.agreed = signal.Signals(found) if found else None
            else:
                late = False
        else:
            self.agreed, late = signals.received, self._is_late()
        if late:
            self.result.ended = f"max_minutes, {self.config.max_minutes:g}, have passed"
        if self.agreed is None and self.result.ended is None and self.before_step is not None:
            decided = self.before_step(step)
            if decided is Next.SAVE:
                self._save()
            elif decided is Next.STOP:
                self.result.ended = "nothing is left to train"
        return self.agreed is not None or self.result.ended is not None

    def _is_late(self) -> bool:
        minutes = self.config.max_minutes
        return minutes is not None and time.monotonic() - self.began > 60 * minutes

    def _loses_patience(self) -> None:
        """End the run where the last evaluations brought no lower mean."""
        config = self.config
        later = without_improvement((row.get("mean") for row in self.log.rows), config.min_improvement)
        if config.patience is not None and later >= config.patience:
            by = f" by {config.min_improvement:g} of it" if config.min_improvement else ""
            self.result.ended = f"the mean validation loss was not lower{by} in {config.patience} evaluations"

    def _train(self, signals: Signals) -> None:
        config, result = self.config, self.result
        tokens, began = 0, time.perf_counter()
        source = self.batches.iterate(result.step)
        while result.step < config.steps and not self._ends(signals):
            started = time.perf_counter()
            batch = next(source)
            tokens += count_tokens(batch)
            self._step(batch)
            self.durations.append(time.perf_counter() - started)
            self.bar.update()
            if self._due(config.log_every):
                self._flush()
                rate = tokens / (time.perf_counter() - began)
                self.bar.set_postfix_str(f"loss {self.latest_loss:.3f}, {rate:,.0f} tokens/s")
            if self._due(config.eval_every):
                self._evaluate()
                self._loses_patience()
            if self._due(config.checkpoint_every):
                self._save()

    def run(self) -> FitResult:
        """Train to the end, or to a signal."""
        result = self.result
        tqdm = require("tqdm").tqdm
        self.log = RunLog(self.run_dir, result.step, board=self.config.board, write=self.main)
        for row in self.log.rows:
            self.plateau.add(row.get("mean"))
        self.model.train()
        # None: a bar on terminals only
        disable = None if self.config.progress and self.main else True
        self.bar = tqdm(total=result.steps, initial=result.step, unit="step", dynamic_ncols=True, disable=disable)
        try:
            with self.bar, Signals() as signals:
                if result.step == 0:
                    self._evaluate()
                self._train(signals)
                if result.step < result.steps:
                    result.interrupted = self.agreed
                if self.saved_step != result.step:
                    self._save()
        finally:
            self.log.close()
        result.step_seconds = statistics.median(self.durations) if self.durations else None
        rows = [row for row in self.log.rows if "validation" in row]
        if rows:
            best = next((row for row in rows if row["step"] == result.best_step), rows[-1])
            result.observed = best.get("observed", {})
            result.first, result.best, result.last = (
                {name: math.nan if loss is None else loss for name, loss in row["validation"].items()}
                for row in (rows[0], best, rows[-1])
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
    weigh: Callable[[Batch], float] = count_rows,
    before_step: Callable[[int], Next] | None = None,
    observe: Callable[[nn.Module], Mapping[str, float]] | None = None,
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
        weigh: a batch to its weight in the mean of the losses of parts of it; a constant adds them up. Of effect with
            several processes or `accumulate` alone.
        before_step: called with each step before its batch is taken, in every process; see `Next`.
        observe: `(model)`, as `evaluate`, to numbers that are logged with each evaluation.

    Started by torchrun or `accelerate launch`, each process takes a share of the rows of each batch. All evaluate, as a
    sharded model needs all; the losses of the main one count, and it alone logs and writes. The model is then trained
    through DDP or FSDP2, as accelerate was configured.

    Raises:
        CheckpointError: see `load_checkpoint`; the run is past `steps`.
        TrainingError: the loss or its gradient is not finite; the checkpoint of before stays.
    """
    return _Run(model, optimizer, batches, config, loss_fn, evaluate, lr_factor, weigh, before_step, observe).run()

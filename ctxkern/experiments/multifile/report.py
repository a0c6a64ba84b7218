"""What a run says on the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import ctxkern
from ctxkern.experiments.core.names import group_notes, join_names
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.costs import StepCosts
from ctxkern.experiments.multifile.forms import BILINEAR, FORMS, NORMED
from ctxkern.experiments.multifile.train import Job, autocast


def describe(job: Job) -> str:
    """Files, tokens, vocabulary, parameters, and how the first layer's projections run."""
    config, counts = job.config, job.model.parameter_counts()
    sources = len(job.dataset.file_paths)
    tokens, held = (data.num_tokens for data in (job.train_data, job.validation_data))
    kind = "characters and 4 specials" if config.tokens == "chars" else "bytes and 3 specials"
    specials = len(job.tokenizer.specials)
    ratio = counts["bilinear"] / max(1, counts["base"])
    threads = f", threads: {torch.get_num_threads()}" if job.device.type == "cpu" else ""
    lines = [
        f"files       {sources}: {join_names(job.dataset.file_names[:sources])}",
        *([f"variants    {job.dataset.num_files - sources}: {config.augment} of each ARC task"] * bool(config.augment)),
        *_notes(job),
        f"tokens      {tokens:,} to train on in {len(job.train_data):,} windows of up to {config.seq_len}, "
        f"{job.train_data.num_labels:,} of them labelled; {held:,} for validation",
        *_cuts(job),
        f"vocabulary  {job.tokenizer.vocab_size - specials} {kind}",
        f"parameters  {counts['total']:,}: base {counts['base']:,}, bilinear {counts['bilinear']:,} "
        f"({ratio:.1f} times the base), contexts {counts['context']:,}",
        f"batches     {job.sampler.batch_size} windows, {len(job.sampler):,} batches per epoch",
        f"device      {job.device}, {config.dtype}{threads}",
        *(f"warning     {text}" for text in warnings_about(config)),
        f"attention   {_plan(job)}",
    ]
    missing = [f"{name} ({status})" for name, status in ctxkern.backends().items() if not status]
    if missing:
        lines.append(f"missing     {'; '.join(missing)}")
    return "\n".join(lines)


def _notes(job: Job) -> list[str]:
    """What of the files is not used: each note once, with the files that it is about."""
    data = job.dataset
    named = zip(data.file_names[: len(data.notes)], data.notes, strict=True)
    pairs = [(name, note) for name, notes in named for note in notes]
    lines = [f"skipped     {file}" for file in data.skipped]
    return lines + [f"note        {join_names(names, 3)}: {note}" for note, names in group_notes(pairs).items()]


def _cuts(job: Job) -> list[str]:
    """The files whose prompts do not fit in front of their answers."""
    cut = dict(job.train_data.cut_prompts)
    for file_id, count in job.validation_data.cut_prompts.items():
        cut[file_id] = cut.get(file_id, 0) + count
    names = [f"{job.dataset.file_names[file_id]} ({count})" for file_id, count in sorted(cut.items())]
    return [f"cut         prompts longer than the window leaves room for: {join_names(names)}"] if names else []


def warnings_about(config: TrainConfig) -> list[str]:
    """Settings that are known not to train well, with the measurement that says so."""
    found = []
    if config.form in BILINEAR and config.init == "randn":
        found.append("--init randn saturates attention: 3.16 nats where normal ended at 2.04")
    if config.form in BILINEAR and config.init == "hyperfan":
        found.append("--init hyperfan ended 0.09 nats above normal")
    if config.rank is None and config.bilinear_lr_scale is not None and config.bilinear_lr_scale > 0.5:
        found.append("--bilinear-lr-scale above 0.5: the sum over the context outruns the base; 1 / context-dim trains")
    if config.form in NORMED and config.context_lr_scale is not None and config.context_lr_scale < 1:
        found.append("--context-lr-scale below 1: the vectors hardly move, and files cannot be told apart by them")
    if not config.context_norm and config.form in NORMED:
        found.append("--no-context-norm: contexts grow or shrink with their learning rate; norm √K ended lower")
    return found


def _plan(job: Job) -> str:
    if job.config.form not in BILINEAR:
        return f"weights are shared; a file's context enters as: {FORMS[job.config.form]}"
    if job.config.attention == "einsum":
        return "einsum: the whole weight of every sequence is made, the form to compare with"
    if job.config.rank is not None:
        return f"bilinear tensors by factors of rank {job.config.rank}: two thin products beside the shared one"
    batch = job.batch_at(0)
    layer: Any = job.model.blocks[0].attention
    weight = layer.W_q_base.weight
    x = torch.empty(*batch["input"].shape, job.config.d_model, device=job.device, dtype=weight.dtype)
    context = job.model.contexts()
    with autocast(job.config, job.device):
        plan = ctxkern.explain(x, context, weight, layer.bilinear_q, context_index=batch["file_id"].to(job.device))
    return "\n            ".join(str(plan).splitlines())


def loss_table(
    first: Mapping[str, float],
    best: Mapping[str, float],
    windows: Mapping[str, int],
    exact: Mapping[str, float] | None = None,
    majority: Mapping[str, float] | None = None,
) -> str:
    """Validation loss of each file before and after, with the number of its training windows and the mean; where
    `exact` has shares of right answers, these and those of always giving the file's most frequent answer."""
    shares = [exact or {}, majority or {}] if any(map(math.isfinite, (exact or {}).values())) else []
    width = max(map(len, [*first, "mean over files"]))
    heads = ["windows", "before", "after", "change", *(["exact", "majority"] if shares else [])]
    lines = [f"{'file':<{width}}  " + "  ".join(f"{head:>8}" for head in heads)]
    for name, before in first.items():
        own = [share.get(name, math.nan) for share in shares]
        lines.append(_row(name, width, f"{windows[name]:,}", before, best[name], own))
    measured = [name for name, loss in first.items() if math.isfinite(loss) and math.isfinite(best[name])]
    if measured:
        before, after = (sum(losses[name] for name in measured) / len(measured) for losses in (first, best))
        means = [_mean([value for value in share.values() if math.isfinite(value)]) for share in shares]
        lines.append(_row("mean over files", width, f"{sum(windows.values()):,}", before, after, means))
    if len(measured) < len(first):
        lines.append("-: no examples of this file are set apart")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _row(name: str, width: int, windows: str, before: float, after: float, shares: Sequence[float]) -> str:
    cells = [f"{value:.4f}" if math.isfinite(value) else "-" for value in (before, after)]
    change = f"{after / before - 1:+.1%}" if math.isfinite(before) and math.isfinite(after) else "-"
    cells = [windows, *cells, change, *(f"{share:.2f}" if math.isfinite(share) else "-" for share in shares)]
    return f"{name:<{width}}  " + "  ".join(f"{cell:>8}" for cell in cells)


def cost_lines(costs: StepCosts, steps: int) -> str:
    """Time and peak memory of a training step without context, with ctxkern and with the einsum module."""
    parts = [
        f"{kind} {costs.seconds[kind] * 1e3:.1f} ms, {costs.peak_bytes[kind] / 2**20:.1f} MiB" for kind in costs.seconds
    ]
    return (
        f"{' | '.join(parts)} (a training step: medians of {steps}, interleaved; peak memory beyond what is held "
        f"before; losses of the last two within {costs.loss_difference:.0e})"
    )

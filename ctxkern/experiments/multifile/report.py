"""What a run says on the terminal."""

import math
from collections.abc import Mapping
from typing import Any

import torch

import ctxkern
from ctxkern.experiments.core.names import group_notes, join_names
from ctxkern.experiments.multifile.compare import StepTimes
from ctxkern.experiments.multifile.train import Job, autocast


def describe(job: Job) -> str:
    """Files, tokens, vocabulary, parameters, and how the first layer's projections run."""
    config, counts = job.config, job.model.parameter_counts()
    tokens, held = (data.num_tokens for data in (job.train_data, job.validation_data))
    kind = "characters and 4 specials" if config.tokens == "chars" else "bytes and 3 specials"
    specials = len(job.tokenizer.specials)
    ratio = counts["bilinear"] / max(1, counts["base"])
    threads = f", threads: {torch.get_num_threads()}" if job.device.type == "cpu" else ""
    lines = [
        f"files       {job.dataset.num_files}: {join_names(job.dataset.file_names)}",
        *_notes(job),
        f"tokens      {tokens:,} to train on in {len(job.train_data):,} windows of up to {config.seq_len}, "
        f"{held:,} for validation",
        f"vocabulary  {job.tokenizer.vocab_size - specials} {kind}",
        f"parameters  {counts['total']:,}: base {counts['base']:,}, bilinear {counts['bilinear']:,} "
        f"({ratio:.1f} times the base), contexts {counts['context']:,}",
        f"batches     {job.sampler.batch_size} windows, {len(job.sampler):,} batches per epoch",
        f"device      {job.device}, {config.dtype}{threads}",
        f"attention   {_plan(job)}",
    ]
    missing = [f"{name} ({status})" for name, status in ctxkern.backends().items() if not status]
    if missing:
        lines.append(f"missing     {'; '.join(missing)}")
    return "\n".join(lines)


def _notes(job: Job) -> list[str]:
    """What of the files is not used: each note once, with the files that it is about."""
    data = job.dataset
    pairs = [(name, note) for name, notes in zip(data.file_names, data.notes, strict=True) for note in notes]
    lines = [f"skipped     {file}" for file in data.skipped]
    return lines + [f"note        {join_names(names, 3)}: {note}" for note, names in group_notes(pairs).items()]


def _plan(job: Job) -> str:
    if job.config.attention == "einsum":
        return "einsum: the whole weight of every sequence is made, the form to compare with"
    if job.config.rank is not None:
        return f"bilinear tensors by factors of rank {job.config.rank}: two thin products beside the shared one"
    batch = job.batch_at(0)
    layer: Any = job.model.blocks[0].attention
    weight = layer.W_q_base.weight
    x = torch.empty(*batch["input"].shape, job.config.d_model, device=job.device, dtype=weight.dtype)
    context = job.model.context_embeddings.weight
    with autocast(job.config, job.device):
        plan = ctxkern.explain(x, context, weight, layer.bilinear_q, context_index=batch["file_id"].to(job.device))
    return "\n            ".join(str(plan).splitlines())


def loss_table(first: Mapping[str, float], last: Mapping[str, float], windows: Mapping[str, int]) -> str:
    """Validation loss of each file before and after, with the number of its training windows and the mean."""
    width = max(map(len, [*first, "mean over files"]))
    lines = [f"{'file':<{width}}  {'windows':>8}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for name, before in first.items():
        lines.append(_row(name, width, f"{windows[name]:,}", before, last[name]))
    measured = [name for name, loss in first.items() if math.isfinite(loss) and math.isfinite(last[name])]
    if measured:
        before, after = (sum(losses[name] for name in measured) / len(measured) for losses in (first, last))
        lines.append(_row("mean over files", width, f"{sum(windows.values()):,}", before, after))
    if len(measured) < len(first):
        lines.append("-: no examples of this file are set apart")
    return "\n".join(lines)


def _row(name: str, width: int, windows: str, before: float, after: float) -> str:
    cells = [f"{value:.4f}" if math.isfinite(value) else "-" for value in (before, after)]
    change = f"{after / before - 1:+.1%}" if math.isfinite(before) and math.isfinite(after) else "-"
    return f"{name:<{width}}  {windows:>8}  {cells[0]:>8}  {cells[1]:>8}  {change:>8}"


def timing_line(times: StepTimes, steps: int) -> str:
    """The cost of a step compared with the einsum's, in one line."""
    return (
        f"training step {times.fused * 1e3:.1f} ms, with the einsum module {times.einsum * 1e3:.1f} ms: "
        f"{times.ratio:.2f} times as long (medians of {steps}, interleaved; losses within {times.loss_difference:.0e})"
    )

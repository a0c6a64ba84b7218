"""`ctxkern generate`, `add-file` and `export`: what a trained run is used for."""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.paths import expand_paths
from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.data.windows import Collator, EncodedDataset
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.tokenizers import save_tokenizer
from ctxkern.experiments.multifile import sweep
from ctxkern.experiments.multifile.adapt import adapt_file
from ctxkern.experiments.multifile.analysis import commands as report
from ctxkern.experiments.multifile.comparison import commands as comparison
from ctxkern.experiments.multifile.generate import generate_text
from ctxkern.experiments.multifile.run import CHECKPOINTS, Run, load_run
from ctxkern.experiments.multifile.train import CHUNK_WINDOWS, criterion

_WINDOWS = 64


def add_parsers(subparsers: Any) -> None:
    """Register the commands."""
    generate = _parser(subparsers, "generate", _generate, "text from a trained run, in the context of a file")
    generate.add_argument("--file", help="whose context: a name, or its number (default: the mean of all contexts)")
    generate.add_argument("--prompt", required=True, help="what to answer, or to go on from")
    generate.add_argument("--max-new-tokens", type=int, default=100, help="the most tokens to write (default: 100)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    generate.add_argument("--top-k", type=int, help="sample from so many likeliest tokens")
    generate.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this probability together")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add = _parser(subparsers, "add-file", _add_file, "learn the context of a new file; nothing else of the run changes")
    add.add_argument("path", type=Path, metavar="PATH", help="the file")
    add.add_argument("--name", help="under which it is known (default: that of the file)")
    add.add_argument("--steps", type=int, default=100, help="of training the vector (default: 100)")
    add.add_argument("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    add.add_argument("--val-fraction", type=float, default=0.2, help="share set apart to measure on (default: 0.2)")
    export = _parser(subparsers, "export", _export, "a program for one file, its weights merged; it needs torch alone")
    export.add_argument("--file", required=True, help="whose context: a name, or its number")
    export.add_argument("--out", type=Path, required=True, help="the .pt2 file to write; a tokenizer.json lies beside")
    comparison.add_parser(subparsers)
    report.add_parsers(subparsers)
    sweep.add_parsers(subparsers)


def _parser(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run of `ctxkern train`")
    parser.add_argument("--checkpoint", choices=tuple(CHECKPOINTS), default="best", help="(default: best)")
    parser.set_defaults(run=run, command=name)
    return parser


def _load(args: argparse.Namespace) -> Run:
    return load_run(args.run_dir, checkpoint=args.checkpoint)


def _generate(args: argparse.Namespace) -> int:
    with as_command_errors():
        run = _load(args)
        if args.file is None:
            file_id = run.model.add_file("mean")
        else:
            file_id = run.file_id(args.file)
        sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
        (text,) = generate_text(run.model, run.tokenizer, [args.prompt], [file_id], **sampling)
    print(text)
    return 0


def _export(args: argparse.Namespace) -> int:
    with as_command_errors():
        if args.out.suffix != ".pt2":
            raise CommandError(f"--out is {printable(args.out)}; it must end in .pt2")
        run = _load(args)
        file_id = run.file_id(args.file)
        merged = run.model_of(file_id).eval()
        tokens = torch.zeros(2, min(4, run.config.seq_len), dtype=torch.int64)
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=run.config.seq_len)}
        with torch.no_grad():
            program = torch.export.export(merged, (tokens,), dynamic_shapes=(sizes,))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, args.out)
        save_tokenizer(run.tokenizer, args.out.with_name("tokenizer.json"))
    print(f"program     {printable(args.out)}: token ids [B, S] to logits [B, S, {run.tokenizer.vocab_size}], "
          f"S up to {run.config.seq_len}, for {run.names[file_id]}")  # fmt: skip
    return 0


def _add_file(args: argparse.Namespace) -> int:
    with as_command_errors():
        for flag, value, least in (("--steps", args.steps, 1), ("--lr", args.lr, 0.0)):
            if not value >= least:
                raise CommandError(f"{flag} is {value}; it must be at least {least}")
        run = _load(args)
        train, held = _read(run, args.path, args.val_fraction)
        name = args.name or args.path.name
        if name in run.names:
            raise CommandError(f"--name is {name!r}; it must be a new one: the run has a file of this name")
        known = run.model.contexts().detach()
        losses = [_loss(run, train, vector) for vector in known]
        nearest = min(range(len(known)), key=losses.__getitem__)
        file_id = run.model.add_file(known[nearest])
        adapt_file(run.model, file_id, _steps(run, train, args.steps), lr=args.lr)
        adapted = run.model.context_embeddings.weight[file_id].detach().clone()
        ways = {
            "no context": torch.zeros_like(adapted),
            "the mean of the known ones": run.model.scaled(known.mean(0, keepdim=True))[0],
            f"the best known one, {run.names[nearest]}": known[nearest],
            f"adapted from it, {args.steps} steps": run.model.contexts()[file_id].detach(),
        }
        fresh = _load(args)
        fresh.remember(name, adapted)
    print(f"loss of {name} (nats per token, {len(held)} windows that were set apart):")
    width = max(map(len, ways))
    for way, vector in ways.items():
        loss = _loss(run, held, vector)
        print(f"  {way:<{width}}  {'-' if math.isnan(loss) else f'{loss:.4f}'}")
    print(f"added as {name!r}, file {len(fresh.names) - 1} of {printable(run.path)}")
    return 0


def _read(run: Run, path: Path, val_fraction: float) -> tuple[EncodedDataset, EncodedDataset]:
    config = run.config
    dataset = MultiFileDataset(
        expand_paths([path]), val_fraction=val_fraction, seed=config.seed, chunk_chars=CHUNK_WINDOWS * config.seq_len
    )
    if dataset.num_files != 1:
        raise CommandError(f"PATH is {printable(path)}; it must be one file, and has {dataset.num_files}")
    parts = [
        EncodedDataset(dataset, run.tokenizer, config.seq_len, loss=config.loss, split=split)
        for split in ("train", "validation")
    ]
    if not len(parts[0]):
        raise CommandError(f"PATH is {printable(path)}, which leaves nothing to train on")
    return parts[0], parts[1]


def _steps(run: Run, data: EncodedDataset, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    collator = Collator(run.tokenizer, run.config.seq_len, longest=True)
    sampler = MixedFileBatchSampler(data.file_ids, min(run.config.batch_size, len(data)), seed=run.config.seed)
    progress = require("tqdm").tqdm(range(steps), unit="step", disable=None)
    return (collator([data[i] for i in sampler.batch_at(step)]) for step in progress)


@torch.no_grad()
def _loss(run: Run, data: EncodedDataset, vector: torch.Tensor) -> float:
    """Of at most so many windows, spread over the file, in the context [K] as layers use it; nan of none."""
    count = min(_WINDOWS, len(data))
    chosen = [data[i * len(data) // count] for i in range(count)]
    collator, total, labels = Collator(run.tokenizer, run.config.seq_len, longest=True), 0.0, 0
    for start in range(0, count, run.config.batch_size):
        batch = collator(chosen[start : start + run.config.batch_size])
        logits = run.model(batch["input"], vector.expand(len(batch["input"]), -1))
        known = int((batch["target"] != -100).sum())
        total, labels = total + float(criterion(logits, batch["target"])) * known, labels + known
    return total / labels if labels else math.nan

"""``ctxkern train``: one model on many files, each with its context."""

import argparse
import contextlib
import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path

from ctxkern.cli import CommandError

CONFIG, TOKENIZER, PLOT = "config.json", "tokenizer.json", "loss.png"
_COMPARED_STEPS = 7
_EXTRAS = ("numpy", "safetensors.torch", "tqdm", "matplotlib", "torch.utils.tensorboard")

# flag, field of TrainConfig, type, help
FLAGS = (
    ("--num-files", "num_files", int, "use the first so many files (default: all)"),
    ("--steps", "training_steps", int, "training steps (default: 400)"),
    ("--batch-size", "batch_size", int, "sequences a step (default: 16)"),
    ("--seq-len", "seq_len", int, "tokens a sequence (default: 128)"),
    ("--d-model", "d_model", int, "width of the model (default: 128)"),
    ("--n-heads", "n_heads", int, "attention heads, a divisor of the width (default: 4)"),
    ("--n-layers", "n_layers", int, "transformer blocks (default: 2)"),
    ("--context-dim", "context_dim", int, "length of a file's context vector (default: 16)"),
    ("--lr", "lr", float, "peak learning rate (default: 0.002)"),
    ("--schedule", "schedule", str, "cosine or constant, after the warmup (default: cosine)"),
    ("--warmup-steps", "warmup_steps", int, "steps of linear warmup (default: 20)"),
    ("--bilinear-lr-scale", "bilinear_lr_scale", float, "of bilinear tensors, over --lr (default: 1 / context-dim)"),
    ("--weight-decay", "weight_decay", float, "of weight matrices (default: 0.01)"),
    ("--bilinear-weight-decay", "bilinear_weight_decay", float, "of bilinear tensors (default: as --weight-decay)"),
    ("--grad-clip", "grad_clip", float, "largest gradient norm, 0 for none (default: 1.0)"),
    ("--dropout", "dropout", float, "share dropped in training (default: 0.0)"),
    ("--tokens", "tokens", str, "chars or bytes (default: chars)"),
    ("--loss", "loss", str, "target: of answers only; all: of prompts too (default: target)"),
    ("--init", "init", str, "bilinear tensors: normal, hyperfan, low_rank or randn (default: normal)"),
    ("--attention", "attention", str, "fused or einsum (default: fused)"),
    ("--dtype", "dtype", str, "float32, bfloat16 (autocast) or float64 (default: float32)"),
    ("--device", "device", str, "cpu, cuda, ... (default: auto)"),
    ("--seed", "seed", int, "of everything random (default: 0)"),
    ("--val-fraction", "val_fraction", float, "share of each file set apart (default: 0.1)"),
    ("--num-workers", "num_workers", int, "processes that prepare batches (default: 0)"),
    ("--eval-every", "eval_every", int, "steps between validations (default: a tenth of the run)"),
    ("--eval-windows", "eval_windows", int, "the most validation windows of a file (default: 16)"),
    ("--checkpoint-every", "checkpoint_every", int, "steps between checkpoints (default: a tenth of the run)"),
)


def add_parser(subparsers) -> None:
    """Register ``train``."""
    parser = subparsers.add_parser(
        "train",
        help="train one model on many files, each with its own context",
        description="Train one transformer on many files at once. Each file has a learned context vector that "
        "modulates the attention weights. Writes checkpoints, logs and a loss plot to the run folder.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATHS",
        help="files, folders or glob patterns: ARC tasks, BIG-Bench JSON, JSON lists, jsonl, any UTF-8 text "
        "(default: sources of the Python standard library)",
    )
    parser.add_argument("--preset", help="debug: the smallest run, on the first two files")
    for flag, name, kind, text in FLAGS:
        names = [flag, "--training-steps"] if name == "training_steps" else [flag]
        parser.add_argument(*names, dest=name, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument(
        "--balanced",
        action=argparse.BooleanOptionalAction,
        help="give every file the same share of the batches (default: by size)",
    )
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/train-DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument(
        "--compare-einsum",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at the end, time the same training step with the einsum module",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _given(args: argparse.Namespace) -> dict:
    from ctxkern.experiments.multifile.config import TrainConfig

    return {name: getattr(args, name) for name in TrainConfig.names() if getattr(args, name) is not None}


def _read_config(run_dir: Path) -> dict:
    path = run_dir / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"train": dict(stored["train"]), "files": list(stored["files"])}
    except FileNotFoundError:
        raise CommandError(
            f"--resume: {run_dir} holds no run ({CONFIG} is missing); start it without --resume"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"--resume: {path} cannot be read: {error!r}") from error


def _resumed(args: argparse.Namespace):
    """Settings and paths of the run in ``--run-dir``, with what may differ taken from the command line."""
    from ctxkern.experiments.core.checkpoint import LAST, read_step
    from ctxkern.experiments.multifile.config import PRESETS, RESUMABLE, TrainConfig
    from ctxkern.experiments.multifile.paths import expand_paths, fingerprint

    if args.run_dir is None:
        raise CommandError("--resume: takes --run-dir, the folder of the run to go on with")
    stored = _read_config(args.run_dir)
    settings = stored["train"]
    flags = {name: flag for flag, name, _, _ in FLAGS}
    for name, value in {**PRESETS.get(args.preset, {}), **_given(args)}.items():
        if name in RESUMABLE:
            settings[name] = value
        elif settings.get(name) != value:
            flag, there = flags.get(name, f"--{name}"), settings.get(name)
            raise CommandError(
                f"{flag}: got {value}, but the run in {args.run_dir} has {'the default' if there is None else there}"
            )
    paths = [Path(entry["path"]) for entry in stored["files"]]
    if args.paths:
        given = [path.resolve() for path in expand_paths(args.paths)][: len(paths)]
        if given != paths:
            raise CommandError(f"PATHS: other files than those of the run in {args.run_dir}; leave them out to resume")
    for entry in stored["files"]:
        if not Path(entry["path"]).is_file():
            raise CommandError(f"--resume: {entry['path']} is gone; the run in {args.run_dir} trains on it")
        if fingerprint(entry["path"]) != entry["sha256"]:
            raise CommandError(f"--resume: {entry['path']} has changed since the run in {args.run_dir} began")
    if (args.run_dir / LAST).exists():
        done = read_step(args.run_dir / LAST)
        if settings["training_steps"] < done:
            raise CommandError(f"--steps: got {settings['training_steps']}, but {args.run_dir} is at step {done}")
    return TrainConfig(**settings), paths, args.run_dir


def _fresh(args: argparse.Namespace):
    """Settings, paths and an unused folder."""
    from ctxkern.experiments.core.checkpoint import LAST
    from ctxkern.experiments.multifile.config import TrainConfig
    from ctxkern.experiments.multifile.paths import expand_paths, standard_library_files

    given = _given(args)
    config = TrainConfig.preset(args.preset, **given) if args.preset else TrainConfig(**given)
    paths = expand_paths(args.paths) if args.paths else standard_library_files()
    run_dir = args.run_dir or Path("runs", time.strftime("train-%Y%m%d-%H%M%S"))
    if (run_dir / CONFIG).exists() or (run_dir / LAST).exists():
        raise CommandError(f"--run-dir: {run_dir} already holds a run; add --resume to go on with it, or name another")
    return config, [path.resolve() for path in paths], run_dir


@contextlib.contextmanager
def _told():
    """Wrong settings and files as :class:`CommandError`."""
    from ctxkern.experiments.core.checkpoint import CheckpointError
    from ctxkern.experiments.core.loop import TrainingError

    try:
        yield
    except (ValueError, TypeError, OSError, CheckpointError, TrainingError) as error:
        raise CommandError(str(error).replace("\n", " ")) from error


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say; 0, or 128 + the signal that stopped it."""
    from ctxkern.experiments.core.extras import require
    from ctxkern.experiments.core.files import write_json_atomic
    from ctxkern.experiments.core.tokenizers import save_tokenizer
    from ctxkern.experiments.multifile import report
    from ctxkern.experiments.multifile.paths import fingerprint
    from ctxkern.experiments.multifile.train import prepare

    # told before the work, not after it
    for module in _EXTRAS:
        require(module)
    with _told():
        config, paths, run_dir = _resumed(args) if args.resume else _fresh(args)
        job = prepare(config, paths)
        run_dir.mkdir(parents=True, exist_ok=True)
        files = [{"path": str(path), "sha256": fingerprint(path)} for path in job.dataset.file_paths]
        save_tokenizer(job.tokenizer, run_dir / TOKENIZER)
        # last: a folder with it can be resumed
        write_json_atomic(run_dir / CONFIG, {"train": asdict(config), "files": files})
    print(report.describe(job))
    print(f"run         {run_dir}\n", flush=True)
    return _train(args, job, run_dir, files)


def _train(args: argparse.Namespace, job, run_dir: Path, files: list[dict]) -> int:
    from ctxkern.experiments.core.checkpoint import LAST
    from ctxkern.experiments.core.plots import plot_losses
    from ctxkern.experiments.core.runlog import LOGS, METRICS, read_metrics
    from ctxkern.experiments.multifile import report
    from ctxkern.experiments.multifile.compare import time_against_einsum
    from ctxkern.experiments.multifile.train import train

    digests = [entry["sha256"] for entry in files]
    with _told():
        result = train(job, run_dir, resume=args.resume, progress=not args.quiet, config={"files": digests})
        sizes = f"d_model {job.config.d_model}, {job.config.n_layers} layers, K {job.config.context_dim}"
        title = f"{job.dataset.num_files} files, {sizes}"
        plot_losses(read_metrics(run_dir), run_dir / PLOT, title=title)
    if result.interrupted:
        print(
            f"\nstopped at step {result.step} of {result.steps} by {result.interrupted.name}; go on with:\n"
            f"  ctxkern train --resume --run-dir {shlex.quote(str(run_dir))}"
        )
        return 128 + result.interrupted
    print(f"\nvalidation loss (nats a token), step 0 and step {result.step}:")
    names = job.dataset.file_names
    windows = dict.fromkeys(names, 0)
    for file_id in job.train_data.file_ids:
        windows[names[file_id]] += 1
    print(report.loss_table(result.first, result.last, windows) if result.first else "no file has any set apart")
    if result.best_step not in (None, result.step):
        print(f"the mean was lowest at step {result.best_step}: {result.best_loss:.4f}")
    best = "" if result.best_step is None else f", best.safetensors (step {result.best_step})"
    print(f"\ncheckpoints {run_dir / LAST}{best}")
    print(f"plot        {run_dir / PLOT}")
    print(f"logs        {run_dir / METRICS}; tensorboard --logdir {run_dir / LOGS}", flush=True)
    if args.compare_einsum and job.config.attention == "fused":
        times = time_against_einsum(job, steps=_COMPARED_STEPS)
        print(f"cost        {report.timing_line(times, _COMPARED_STEPS)}")
    return 0

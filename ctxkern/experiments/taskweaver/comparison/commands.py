"""`ctxkern taskweaver compare`: does the prompt matter, and is a hypernetwork worth its parameters?"""

import argparse
from pathlib import Path
from typing import Any

import ctxkern
from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.plots import require_matplotlib
from ctxkern.experiments.taskweaver.config import DATASET, PROMPT, SHARED, WEIGHTS, TaskWeaverSettings
from ctxkern.experiments.taskweaver.configs import read_configs

_EXAMPLES = """examples:
  ctxkern taskweaver compare --run-dir runs/weavers --dataset_config tasks.json --held_out_config others.json
  ctxkern taskweaver compare --run-dir runs/rates --dataset_config tasks.json --rates 3e-4,1e-3 --tune_steps 50

A command that was stopped or killed goes on where it was when it is given again."""
_LEGEND = """loss: nats per token of answers, mean over datasets and seeds. Δ: minus that with weights of the prompt,
paired by dataset and seed. 95 %: bootstrap over datasets and their seeds. worse: datasets with a higher loss.
majority: what the most frequent answer of each dataset would match."""
# settings that are the comparison's
_OWN = ("weights", "adapter_rank", "learning_rate")


def add_parser(subparsers: Any) -> None:
    """Register `compare` in the group."""
    parser = subparsers.add_parser(
        "compare",
        usage="%(prog)s --run-dir DIR --dataset_config FILE [options]",
        help="compare a hypernetwork with adapters of as many parameters, with other prompts, and with few shots",
        description="Train a hypernetwork, one adapter that all datasets share and one adapter a dataset, each with\n"
        "as many parameters, as many steps and the same examples, with several seeds. Measure on examples that\n"
        "were set apart, and on datasets that were held out: weights of each prompt (aligned), of another\n"
        "dataset's prompt (shuffled), of a prompt without text (blank), both kinds of adapters, the language\n"
        "model alone (base), and the language model after a few answered examples.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("comparison")
    group.add_argument("--run-dir", type=Path, required=True, help="folder of all runs and of the results")
    for flag, kind, default, text in (
        ("--held_out_config", Path, None, "JSON file that lists datasets to measure on alone"),
        ("--seeds", int, 3, "how many, from --seed on (default: 3)"),
        ("--rates", str, "1e-3", "learning rates that the hypernetwork tries, with commas (default: 1e-3)"),
        ("--adapter_rates", str, None, "learning rates that both kinds of adapters try (default: as --rates)"),
        ("--tune_steps", int, None, "of each run that tries one (default: a third of the steps)"),
        ("--workers", int, 1, "runs at a time (default: 1)"),
        ("--examples", int, 64, "the most of each dataset to measure on (default: 64)"),
        ("--shots", int, 3, "answered examples before a prompt; 0 leaves that out (default: 3)"),
        ("--max_new_tokens", int, None, "longest answer; 0: as for evaluate (default: the longest of a batch)"),
    ):
        flags = dict.fromkeys((flag, flag.replace("_", "-")))
        group.add_argument(*flags, type=kind, default=default, help=text)
    TaskWeaverSettings.add_flags(parser)
    parser.set_defaults(run=run, command="taskweaver compare")


def run(args: argparse.Namespace) -> int:
    """Run what is not yet there, measure it, then write the tables and the picture."""
    from ctxkern.experiments.taskweaver.comparison.results import plot, summarise, table

    require("accelerate")
    require("transformers", "models")
    require_matplotlib()
    with as_command_errors():
        study = _study(args)
        print(_describe(study), flush=True)
        try:
            study.tune()
            results = study.train()
            bar = require("tqdm").tqdm(unit="example", disable=None)

            def report(name: str, done: int, total: int) -> None:
                bar.total = total
                bar.set_postfix_str(name, refresh=False)
                bar.update(done - bar.n)

            with bar:
                rows = study.evaluate(report)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", flush=True)
            raise
        summaries = summarise(rows)
        runs = [
            {
                "weights": weights,
                "seed": seed,
                "learning_rate": study.tuned[weights],
                "parameters": result["details"]["trainable"],
                "steps": result["step"],
                "step_seconds": result["step_seconds"],
                "peak_bytes": result["peak_bytes"],
                "ctxkern": ctxkern.__version__,
            }
            for (weights, seed), result in results.items()
        ]
        write_csv_atomic(study.folder / "results.csv", rows)
        write_csv_atomic(study.folder / "runs.csv", runs)
        plain = [{key: value for key, value in vars(one).items() if key != "by_dataset"} for one in summaries]
        write_csv_atomic(study.folder / "table.csv", plain)
        plot(summaries, study.folder / "compare.png", f"{study.seeds} seeds")
    print(f"{table(summaries)}\n\n{_LEGEND}\n")
    for weights in WEIGHTS:
        some = next(one for one in runs if one["weights"] == weights)
        print(f"{weights:<11} {some['parameters']:,} trained parameters, learning rate {some['learning_rate']:g}")
    print(f"\ntables      {printable(study.folder)}/results.csv, runs.csv, table.csv")
    print(f"picture     {printable(study.folder)}/compare.png")
    return 0


def _study(args: argparse.Namespace) -> Any:
    from ctxkern.experiments.taskweaver.comparison.study import Measure, Study

    shared = TaskWeaverSettings.given(args)
    for name in _OWN:
        if name in shared:
            raise CommandError(f"{TaskWeaverSettings.flag(name)} is given; it must be left to the comparison")
    for name, least in (("seeds", 1), ("workers", 1), ("examples", 1), ("shots", 0), ("tune_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise CommandError(f"--{name} is {value}; it must be at least {least}")
    if args.max_new_tokens is not None and args.max_new_tokens < 0:
        raise CommandError(f"--max_new_tokens is {args.max_new_tokens}; it must be at least 0")
    own = _rates("--rates", args.rates)
    others = own if args.adapter_rates is None else _rates("--adapter_rates", args.adapter_rates)
    config = TaskWeaverSettings(**shared)
    if max(len(own), len(others)) > 1 and not args.tune_steps and not config.training_steps:
        raise CommandError("--tune_steps is left out; it must be given where --steps is not")
    if not config.val_fraction:
        raise CommandError("--val_fraction is 0; it must be above 0: what is set apart is measured on")
    # said before the first run
    config.datasets()
    held_out = read_configs(str(args.held_out_config)) if args.held_out_config else []
    return Study(
        folder=args.run_dir.absolute(),
        shared=shared,
        held_out=held_out,
        seeds=args.seeds,
        rates={weights: own if weights == PROMPT else others for weights in WEIGHTS},
        tune_steps=args.tune_steps or max(1, config.training_steps // 3),
        measure=Measure(args.examples, args.shots, args.max_new_tokens, config.batch_size),
        workers=args.workers,
    )


def _rates(flag: str, given: str) -> list[float]:
    rates = []
    for text in filter(None, given.split(",")):
        try:
            rates.append(float(text))
        except ValueError:
            rates.append(0.0)
        if not 0 < rates[-1] < float("inf"):
            raise CommandError(f"{flag} has {text!r}; it must have numbers above 0, with commas between")
    if not rates:
        raise CommandError(f"{flag} is empty; it must have at least one number")
    return rates


def _describe(study: Any) -> str:
    tried = sum(len(rates) for rates in study.rates.values() if len(rates) > 1)
    tuned = f"; {tried} more of {study.tune_steps:,} steps choose learning rates" if tried else ""
    ways = {PROMPT: "weights of each prompt, by a hypernetwork", SHARED: "one adapter", DATASET: "one a dataset"}
    return (
        f"trained     {'; '.join(ways.values())}\n"
        f"datasets    {len(study.config.datasets())} to train on, {len(study.held_out)} held out\n"
        f"runs        {study.seeds * len(WEIGHTS)}, {study.seeds} seeds{tuned}\n"
        f"folder      {printable(study.folder)}\n"
    )

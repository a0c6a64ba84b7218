"""`ctxkern taskweaver generate`, `export` and `evaluate`: what a trained TaskWeaver does."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.hub import load_language_model
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.settings import RunSettings
from ctxkern.experiments.taskweaver.comparison import commands as compare

# in a run folder, whose config.json is that of the run
MODEL = "model"


def add_parsers(subparsers: Any) -> None:
    """Register the commands in the group."""
    generate = subparsers.add_parser("generate", help="continue prompts, each in the weights of its own")
    generate.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="a text as its processor ends prompts, in Answer: or a line end; may be given several times",
    )
    generate.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=100, help="default: 100")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--num_beams", "--num-beams", type=int, default=1, help="default: 1")
    generate.add_argument(
        "--num_return_sequences", "--num-return-sequences", type=int, default=1, help="of each prompt (default: 1)"
    )
    generate.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    export = subparsers.add_parser("export", help="write the weights of a prompt as an adapter in PEFT's format")
    export.add_argument("--prompt", required=True, help="a text")
    export.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    evaluate = subparsers.add_parser(
        "evaluate",
        help="measure it with the weights of the prompt, of another task's prompt, of a blank one, and with none",
        description=(
            "Token accuracy and exact match for each dataset, which it need not have been trained on: with weights of\n"
            "each prompt (aligned), of another dataset's prompt (shuffled), of a prompt without text (blank), and\n"
            "with the language model alone (base)."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--dataset_config", "--dataset-config", required=True, help="JSON file that lists datasets")
    evaluate.add_argument("--examples", type=int, default=64, help="the most of each dataset (default: 64)")
    evaluate.add_argument("--batch_size", "--batch-size", type=int, default=16, help="default: 16")
    evaluate.add_argument("--max_length", "--max-length", type=int, default=512, help="longest example (default: 512)")
    evaluate.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=int,
        help="longest answer; 0: none is generated, exact match is by likeliest tokens, which is faster (default: the "
        "longest completion of a batch)",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    evaluate.add_argument("--out", type=Path, help="CSV file (default: evaluation.csv in MODEL_DIR)")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    compare.add_parser(subparsers)
    for parser, run, name in (
        (generate, _generate, "generate"),
        (export, _export, "export"),
        (evaluate, _evaluate, "evaluate"),
    ):
        parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="folder of save_pretrained, or of a run")
        parser.add_argument("--model_name", "--model-name", help="language model in place of that of the folder")
        parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
        parser.set_defaults(run=run, command=f"taskweaver {name}")


def _at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise CommandError(f"--{name} is {value}; it must be at least {least}")


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(TaskWeaver, tokenizer of its language model) of MODEL_DIR."""
    from ctxkern.experiments.taskweaver.files import TENSORS, load_config
    from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver

    place = args.model_dir / MODEL if (args.model_dir / MODEL / TENSORS).exists() else args.model_dir
    config = load_config(place)
    device = RunSettings(device=args.device).torch_device()
    lm, tokenizer = load_language_model(args.model_name or config.model_name, device, torch.float32)
    weaver = TaskWeaver.from_pretrained(place, model_name=args.model_name, device=str(device), lm=lm)
    return weaver, tokenizer.plain


def _encoded(tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    from ctxkern.experiments.taskweaver.data import Collator
    from ctxkern.experiments.taskweaver.processors import DatasetProcessor

    # nothing is cut
    processor = DatasetProcessor(tokenizer, max_length=2**31)
    rows = [processor.encode_prompt(prompt)[0] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise CommandError(f"--prompt is {prompt!r}; it must have some text")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    items = [{"input_ids": torch.tensor(row), "prompt_length": len(row), "file_id": 0} for row in rows]
    return Collator(pad, "left")(items)


def _generate(args: argparse.Namespace) -> int:
    _at_least(args, 1, "max_new_tokens", "num_beams", "num_return_sequences")
    _at_least(args, 0, "temperature")
    if args.num_return_sequences > 1 and not args.temperature and args.num_return_sequences > args.num_beams:
        raise CommandError(
            f"--num_return_sequences is {args.num_return_sequences}; it must be at most --num_beams, which is "
            f"{args.num_beams}, unless --temperature is above 0"
        )
    with as_command_errors():
        weaver, tokenizer = _load(args)
        batch = _encoded(tokenizer, args.prompt)
        torch.manual_seed(args.seed % 2**63)
        device = weaver.lm.device
        found = weaver.generate(
            batch["input_ids"].to(device),
            batch["attention_mask"].to(device),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            do_sample=args.temperature > 0,
            num_beams=args.num_beams,
            num_return_sequences=args.num_return_sequences,
        )
    texts = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for number, text in enumerate(texts):
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}{args.prompt[number // args.num_return_sequences]}")
        print(text.strip("\n"))
    return 0


def _export(args: argparse.Namespace) -> int:
    with as_command_errors():
        weaver, tokenizer = _load(args)
        ids = _encoded(tokenizer, [args.prompt])["input_ids"]
        weaver.export(ids.to(weaver.lm.device), args.out)
    print(f"adapter     {printable(args.out)}, in PEFT's format")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from ctxkern.experiments.taskweaver.configs import read_configs
    from ctxkern.experiments.taskweaver.data import create_dataset
    from ctxkern.experiments.taskweaver.evaluation import evaluate, prompt_arms, spread
    from ctxkern.experiments.taskweaver.hypernetwork import check_positions

    _at_least(args, 1, "examples", "batch_size")
    _at_least(args, 0, "max_new_tokens")
    out = args.out or args.model_dir / "evaluation.csv"
    if not out.parent.is_dir():
        raise CommandError(f"--out is {printable(out)}; its folder must exist")
    with as_command_errors():
        # said before the model is read
        configs = read_configs(args.dataset_config)
        weaver, tokenizer = _load(args)
        dataset = create_dataset(configs, tokenizer, args.max_length)
        check_positions(weaver.lm, "max_length", dataset.longest())
        for name, note in dataset.notes:
            print(f"cut         {name}: {note}, to fit --max_length")
        chosen = spread(dataset, range(len(dataset)), args.examples)
        arms = prompt_arms(weaver, tokenizer, dataset, chosen, args.seed)
        total = len(chosen) * len(arms)
        bar = require("tqdm").tqdm(total=total, unit="example", disable=True if args.quiet else None)
        with bar:
            rows = evaluate(
                arms,
                tokenizer,
                dataset,
                chosen,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                report=bar.update,
            )
        write_csv_atomic(out, rows)
    _print_table(rows)
    print(f"\ntable       {printable(out)}")
    return 0


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["dataset"]) for row in rows)
    print(f"{'dataset':<{max(width, 7)}}  weights   examples    loss  token accuracy  exact match  majority")
    for row in rows:
        print(
            f"{row['dataset']:<{max(width, 7)}}  {row['weights']:<8}  {row['examples']:>8}  {row['loss']:>6.4f}  "
            f"{row['token_accuracy']:>14.3f}  {row['exact_match']:>11.3f}  {row['majority']:>8.3f}"
        )

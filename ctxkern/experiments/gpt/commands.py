"""The commands of the group `ctxkern gpt` besides `train`; here `generate`, text from a trained run."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.command import CommandError, as_command_errors
from ctxkern.experiments.core.names import join_names
from ctxkern.experiments.core.settings import RunSettings
from ctxkern.experiments.gpt import compare


def add_parsers(subparsers: Any) -> None:
    """Register the commands in the group."""
    parser = subparsers.add_parser(
        "generate",
        help="text from a trained run, of any length",
        description="Continue a prompt character by character, past the block size too.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run of `ctxkern gpt train`")
    parser.add_argument("--prompt", default="\n", help="what to go on from (default: a line end)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="characters to write (default: 500)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default: 1)")
    parser.add_argument("--top-k", type=int, help="sample from so many likeliest characters")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--file", help="in the context of which text (default: the mean of all contexts)")
    parser.add_argument(
        "--keep",
        type=int,
        help="characters that are read again when the window is full; the block size is slowest (default: half of it)",
    )
    parser.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep keys and values; the text is the same without (default: yes)",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: best)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
    parser.set_defaults(run=_generate, command="gpt generate")
    compare.add_parser(subparsers)


def _generate(args: argparse.Namespace) -> int:
    from ctxkern.experiments.gpt.run import generate, load_run

    with as_command_errors():
        if args.max_new_tokens < 1:
            raise CommandError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
        device = RunSettings(device=args.device).torch_device()
        run = load_run(args.run_dir, checkpoint=args.checkpoint, device=device)
        unknown = run.tokenizer.unknown(args.prompt)
        ids = run.tokenizer.encode(args.prompt)
        if not ids:
            raise CommandError(f"--prompt is {args.prompt!r}; it must have a character of the run's vocabulary")
        if unknown:
            which = join_names([repr(character) for character in unknown], 12)
            print(f"ctxkern gpt generate: the vocabulary lacks {which} of --prompt", file=sys.stderr)
        tokens = generate(
            run.model,
            torch.tensor([ids], device=device),
            contexts=run.context(args.file),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            generator=torch.Generator(device).manual_seed(args.seed % 2**63),
            use_cache=args.cache,
            keep=args.keep,
        )
    print(run.tokenizer.decode(tokens[0].tolist()))
    return 0

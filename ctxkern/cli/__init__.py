"""The command `ctxkern`: the modules here with `add_parser(subparsers)`, and the experiments."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import ctxkern
from ctxkern.experiments import EXPERIMENTS, GROUPS
from ctxkern.experiments.core.command import CommandError, add_experiment
from ctxkern.experiments.core.extras import MissingExtraError
from ctxkern.experiments.core.processes import is_main

__all__ = ["COMMANDS", "CommandError", "build_parser", "main"]

COMMANDS = ("bench", "check")
# 128 + SIGINT, as shells have it
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(prog="ctxkern", description=ctxkern.__doc__)
    parser.add_argument("--version", action="version", version=f"ctxkern {ctxkern.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    groups = {}
    for name, (text, module) in GROUPS.items():
        if name:
            parent = subparsers.add_parser(name, help=text, description=text)
            groups[name] = parent.add_subparsers(metavar="COMMAND", required=True)
        importlib.import_module(module).add_parsers(groups.get(name, subparsers))
    for name, place in EXPERIMENTS.items():
        module, _, attribute = place.partition(":")
        group = name.partition(" ")[0]
        add_experiment(groups.get(group, subparsers), name, getattr(importlib.import_module(module), attribute)())
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    return parser


def _escape_what_it_cannot_encode(stream: TextIO) -> None:
    """File names and symbols that the terminal's encoding lacks are written as escapes, not raised as errors."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's) and return the exit status.

    0: done. 2: the arguments or the files are unusable, as one line on stderr says (one per file where several files
    are). 128 + n: stopped by signal n.
    """
    _escape_what_it_cannot_encode(sys.stdout)
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.run(args) or 0
    except (CommandError, MissingExtraError) as error:
        if is_main():
            print(f"ctxkern {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ctxkern {args.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader of stdout is gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

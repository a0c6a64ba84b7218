"""The command ``ctxkern``: each subcommand is a module here with ``add_parser(subparsers)`` and ``run(args)``."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

import ctxkern
from ctxkern.experiments.core.extras import MissingExtraError

COMMANDS = ("train", "bench", "check")
# 128 + SIGINT, as shells have it
_INTERRUPTED = 130


class CommandError(Exception):
    """The command cannot be done as asked: said in one line, exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands that are installed."""
    parser = _Parser(prog="ctxkern", description=ctxkern.__doc__)
    parser.add_argument("--version", action="version", version=f"ctxkern {ctxkern.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if importlib.util.find_spec(f"{__name__}.{name}"):
            importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's) and return the exit status.

    0: done. 2: the arguments or the files do not do, told in one line on stderr. 128 + n: stopped by signal n.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        module = importlib.import_module(f"{__name__}.{args.command}")
        return module.run(args) or 0
    except (CommandError, MissingExtraError) as error:
        print(f"ctxkern {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ctxkern {args.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader of stdout is gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

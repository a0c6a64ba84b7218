import io
import sys

import pytest

import ctxkern
from ctxkern.cli import COMMANDS, build_parser, main
from ctxkern.experiments import EXPERIMENTS


def test_commands_are_asked_for(capsys):
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert main(["--version"]) == 0
    assert ctxkern.__version__ in capsys.readouterr()[0]


def test_the_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr()[0]
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "}
    for name in (*EXPERIMENTS, *COMMANDS):
        assert name.partition(" ")[0] in listed


@pytest.mark.parametrize("name", [*EXPERIMENTS, *COMMANDS])
def test_every_command_has_help_and_something_to_run(capsys, name):
    assert main([*name.split(), "--help"]) == 0
    assert f"usage: ctxkern {name}" in capsys.readouterr()[0]
    args = build_parser().parse_args(name.split())
    assert callable(args.run)
    assert args.command == name


def test_an_ascii_stdout_gets_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    main(["--version"])
    print("2 × caf\udce9")
    stream.flush()
    assert stream.buffer.getvalue().endswith(rb"2 \xd7 caf\udce9" + b"\n")

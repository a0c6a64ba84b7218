"""`ctxkern adapters add`, `retire` and `list`: what a run that trains, or is about to be resumed, is asked."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from ctxkern.experiments.adapters import requests
from ctxkern.experiments.adapters.train import ROSTER
from ctxkern.experiments.core.command import CommandError
from ctxkern.experiments.core.names import printable

_PAUSE = 0.2


def add_parsers(subparsers: Any) -> None:
    """Register the commands in the group."""
    add = subparsers.add_parser("add", help="add an adapter to a run that trains")
    add.add_argument("run_dir", type=Path, metavar="RUN", help="the run folder")
    add.add_argument("path", type=Path, metavar="PATH", help="a file, or a folder of files, to train on")
    add.add_argument("--name", help="of the adapter (default: that of the file)")
    add.add_argument("--lr", type=float, help="learning rate (default: that of the run)")
    add.add_argument("--steps", type=int, help="its own steps (default: as the run has them)")
    retire = subparsers.add_parser("retire", help="export an adapter of a run and free its row")
    retire.add_argument("run_dir", type=Path, metavar="RUN", help="the run folder")
    retire.add_argument("name", metavar="NAME", help="the adapter")
    for parser in (add, retire):
        parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for the answer (default: 60)")
    shown = subparsers.add_parser("list", help="the adapters of a run")
    shown.add_argument("run_dir", type=Path, metavar="RUN", help="the run folder")
    for parser, run, name in ((add, _add, "add"), (retire, _retire, "retire"), (shown, _list, "list")):
        parser.set_defaults(run=run, command=f"adapters {name}")


def _roster(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / ROSTER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CommandError(f"RUN is {printable(run_dir)}; it must be a folder of `ctxkern adapters train`") from None


def _ask(args: argparse.Namespace, request: dict[str, Any]) -> int:
    _roster(args.run_dir)
    place = requests.ask(args.run_dir, request)
    ends = time.monotonic() + args.wait
    while not place.exists():
        if time.monotonic() > ends:
            print(f"no answer yet: the run takes it up when it trains; the answer will be {printable(place)}")
            return 0
        time.sleep(_PAUSE)
    said = json.loads(place.read_text(encoding="utf-8"))
    if "refused" in said:
        raise CommandError(said["refused"])
    print(", ".join(f"{key} {value}" for key, value in said.items()))
    return 0


def _add(args: argparse.Namespace) -> int:
    for flag, value in (("--lr", args.lr), ("--steps", args.steps)):
        if value is not None and not 0 < value < math.inf:
            raise CommandError(f"{flag} is {value}; it must be above 0, and finite")
    if not args.path.exists():
        raise CommandError(f"PATH is {printable(args.path)}; there is no file or folder of this name")
    name = args.name or (args.path.name if args.path.is_dir() else args.path.stem)
    path = str(args.path.absolute())
    return _ask(args, {"do": "add", "name": name, "path": path, "lr": args.lr, "steps": args.steps})


def _retire(args: argparse.Namespace) -> int:
    return _ask(args, {"do": "retire", "name": args.name})


def _list(args: argparse.Namespace) -> int:
    members = _roster(args.run_dir)["members"]
    width = max(map(len, (member["name"] for member in members)), default=0)
    print(f"{'adapter':<{width}}  row   steps  state      validation")
    for member in members:
        row = "–" if member["slot"] is None else member["slot"]
        loss = "–" if member["validation"] is None else f"{member['validation']:.4f}"
        print(f"{member['name']:<{width}}  {row:>3}  {member['done']:>6}  {member['state']:<9}  {loss}")
    return 0

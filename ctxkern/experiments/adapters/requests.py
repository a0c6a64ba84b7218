"""Adapters added and retired while a run trains: a file for each request in the run folder, and one for its answer."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.files import write_json_atomic

FOLDER = "requests"


def ask(run_dir: Path, request: dict[str, Any]) -> Path:
    """Leave a request for the run; returns where its answer will be."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_dir) as scratch:
        written = Path(scratch) / "request"
        write_json_atomic(written, request)
        # a number is taken together with what it stands for, so that no earlier one comes later
        while True:
            number = max((number for number, _ in _numbered(folder)), default=0) + 1
            try:
                os.link(written, folder / f"{number:06}.json")
            except FileExistsError:
                continue
            return folder / f"{number:06}.answer"


def answer(run_dir: Path, number: int, **what: Any) -> None:
    """Say what became of a request."""
    write_json_atomic(run_dir / FOLDER / f"{number:06}.answer", what)


def waiting(run_dir: Path, applied: int) -> list[tuple[int, dict[str, Any]]]:
    """The requests after number `applied`, in order."""
    folder = run_dir / FOLDER
    found = sorted(_numbered(folder)) if folder.is_dir() else []
    return [(number, json.loads(path.read_text(encoding="utf-8"))) for number, path in found if number > applied]


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    return ((int(path.stem), path) for path in folder.glob("[0-9]*.json"))

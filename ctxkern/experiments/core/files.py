"""Whole-or-nothing file writes."""

import contextlib
import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEMP_PREFIX = ".writing-"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move the result to `path`: readers see the old file or the new, never a part.

    The temporary lies in the folder of `path`; file and folder are flushed to the disk. If `write` fails, `path`
    is as it was.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp and safetensors leave 0600
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # folders cannot be opened for fsync on every system
    with contextlib.suppress(PermissionError):
        _fsync(path.parent)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """`write_atomic` of a UTF-8 text with `\\n` line ends."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json_atomic(path: str | os.PathLike, value: object) -> None:
    """`write_atomic` of `value` as indented JSON."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def write_csv_atomic(
    path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """`write_atomic` of a CSV file, nan as nothing; `columns` are those of all `rows` as they come up, if not given."""
    text = io.StringIO()
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()})
    write_text_atomic(path, text.getvalue())


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Delete the temporaries that killed writers left in `folder`."""
    for leftover in Path(folder).glob(TEMP_PREFIX + "*"):
        leftover.unlink(missing_ok=True)

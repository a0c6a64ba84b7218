"""Files of several kinds read as lists of `{"input", "target"}` items."""

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctxkern.experiments.core.data.arc import arc_items, arc_tasks
from ctxkern.experiments.core.data.decoding import decode_text
from ctxkern.experiments.core.data.records import PREAMBLE, record_to_item, to_text
from ctxkern.experiments.core.names import one_line, printable

CHUNK_CHARS = 1024
# a text is cut in at least this many chunks, so that a tenth can be set apart
_MIN_CHUNKS = 10
_LISTS = ("examples", "data", "records", "rows", "instances")
JSON_SUFFIXES = (".json",)
JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class BadFile:
    """A file that cannot be trained on, and the reason in a few words."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class BadFilesError(ValueError):
    """Files that cannot be trained on: all of them, one per line, each with its reason."""

    def __init__(self, files: Sequence[BadFile], heading: str = ""):
        self.files = list(files)
        lines = [str(file) for file in self.files]
        if len(lines) > 1 or heading:
            lines.insert(0, heading or f"{len(lines)} files cannot be read (--skip-bad leaves them out):")
        super().__init__("\n  ".join(lines))


@dataclass
class FileContent:
    """What `read_file` found: items with the strings `input` and `target`, and `notes` on what was not used."""

    path: Path
    items: list[dict]
    sha256: str = ""
    notes: list[str] = field(default_factory=list)


def chunk_text(text: str, chunk_chars: int = CHUNK_CHARS) -> list[dict]:
    """Contiguous chunks of `text` as items with an empty `input`; `continues` is true on all but the last.

    A short text is cut finer, in ten chunks where it can be.
    """
    size = max(1, min(chunk_chars, -(-len(text) // _MIN_CHUNKS)))
    starts = range(0, len(text), size)
    return [
        {"input": "", "target": text[i : i + size], "continues": i + size < len(text), "kind": "text"} for i in starts
    ]


def parse_json(text: str, line: int = 1) -> object:
    """JSON that begins at `line` of its file, or a ValueError that names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (one record per line is the suffix .jsonl)" if error.msg == "Extra data" else ""
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{where}: not JSON: {error.msg}{hint}") from error
    except RecursionError:
        raise ValueError(f"line {line}: JSON nested too deeply to read") from None
    except ValueError:
        # the only other one: an integer of more digits than Python reads
        digits = sys.get_int_max_str_digits()
        found = re.search(rf"\d{{{digits + 1},}}", text)
        line += text.count("\n", 0, found.start()) if found else 0
        raise ValueError(f"line {line}: an integer of more than {digits} digits") from None


def _read_records(numbered: Iterable[tuple[str, object]], preamble: Sequence[str] = ()) -> tuple[list[dict], list[str]]:
    """Items of (place, record) pairs, and a note on the keys that no item uses."""
    items: list[dict] = []
    unused: set[str] = set()
    for place, record in numbered:
        try:
            item = record_to_item(record, preamble)
            items.append(item.as_dict())
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        unused.update(item.unused)
    return items, _note_unused(unused)


def _note_unused(keys: Iterable[str]) -> list[str]:
    keys = sorted(map(printable, keys))
    return [f"fields not used: {', '.join(keys)}"] if keys else []


def _read_json(text: str) -> tuple[list[dict], list[str]]:
    value = parse_json(text)
    tasks = arc_tasks(value)
    if tasks:
        return arc_items(tasks)
    if isinstance(value, list):
        return _read_records((f"entry {i}", record) for i, record in enumerate(value, 1))
    if not isinstance(value, Mapping):
        raise ValueError(f"its JSON is of the type {type(value).__name__}; it must be an object or a list")
    lower = {str(key).lower(): key for key in value}
    for key in _LISTS:
        if isinstance(value.get(lower.get(key)), list):
            preamble = [to_text(value[lower[k]]) for k in PREAMBLE if value.get(lower.get(k))]
            numbered = ((f"{key} entry {i}", record) for i, record in enumerate(value[lower[key]], 1))
            items, notes = _read_records(numbered, preamble)
            others = [k for k in lower if k != key and k not in PREAMBLE and value[lower[k]] is not None]
            return items, [*_note_unused(others), *notes]
    try:
        item = record_to_item(value)
        return [item.as_dict()], _note_unused(item.unused)
    except ValueError as error:
        raise ValueError(
            f"{error}, or be an ARC task (train and test), or hold a list under one of {', '.join(_LISTS)}"
        ) from error


def _read_jsonl(text: str) -> tuple[list[dict], list[str]]:
    records = []
    # only \n ends a record: JSON strings may hold other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append((f"line {number}", parse_json(line, number)))
    tasks = arc_tasks([record for _, record in records])
    return arc_items(tasks) if tasks else _read_records(records)


def read_bytes(path: Path) -> bytes:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{printable(path)}: is a folder; it must be a file")
    if not stat.S_ISREG(mode):
        raise ValueError("not a regular file (a pipe, socket or device)")
    return path.read_bytes()


def read_file(path: str | os.PathLike, *, chunk_chars: int = CHUNK_CHARS) -> FileContent:
    """`load_file` with the file's SHA-256 and notes on what of it is not used.

    Raises:
        OSError, ValueError: as `load_file`.
    """
    if chunk_chars < 1:
        raise ValueError(f"chunk_chars is {chunk_chars}; it must be at least 1")
    path = Path(path)
    suffix = path.suffix.lower()
    read: Callable[[str], tuple[list[dict], list[str]]]
    if suffix in JSON_SUFFIXES:
        read = _read_json
    elif suffix in JSONL_SUFFIXES:
        read = _read_jsonl
    else:
        read = lambda text: (chunk_text(text, chunk_chars), [])  # noqa: E731
    try:
        data = read_bytes(path)
        if not data:
            raise ValueError("it is empty")
        text, encoding = decode_text(data)
        items, notes = read(text)
        if not items:
            raise ValueError("it has no examples")
    except RecursionError:
        raise ValueError(f"{printable(path)}: JSON nested too deeply to read") from None
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {one_line(error)}") from error
    if encoding != "UTF-8":
        notes = [f"read as {encoding}", *notes]
    return FileContent(path, items, hashlib.sha256(data).hexdigest(), notes)


def load_file(path: str | os.PathLike, *, chunk_chars: int = CHUNK_CHARS) -> list[dict]:
    """Read one file as a list of items with the strings `input` and `target`.

    - `.json`: an ARC task `{"train": [{"input", "output"}], "test": [...]}`, or a list or an object of many, with grids
      as lines of digits and test pairs with `"split": "validation"`; `{"examples": [...]}` (BIG-Bench Hard); a list of
      records; one record.
    - `.jsonl`, `.ndjson`: one record per line.
    - anything else: text in chunks (`chunk_text`); `input` is empty.

    A record has one of the key pairs in `records.PAIRS` (in any case), chat `messages` that end with the assistant's,
    or `text` alone. Its system, definition, instruction, context and choices fields become part of the prompt. The
    encoding is UTF-8, or UTF-16 or UTF-32 (with or without a byte order mark). Line ends become `\\n`.

    Args:
        path: the file.
        chunk_chars: the longest chunk of a plain text, in characters.

    Raises:
        OSError: the file cannot be opened.
        ValueError: empty, not text, NUL characters, not JSON, or records without the usual keys; the message names file
            and place.
    """
    return read_file(path, chunk_chars=chunk_chars).items


def read_files(
    paths: Iterable[str | os.PathLike],
    *,
    chunk_chars: int = CHUNK_CHARS,
    limit: int | None = None,
    skip_bad: bool = False,
    bad: Sequence[BadFile] = (),
) -> tuple[list[FileContent], list[BadFile]]:
    """The contents of the first `limit` readable files of `paths`, and the bad ones.

    Args:
        paths: the files.
        chunk_chars: as for `load_file`.
        limit: how many to read; None reads all.
        skip_bad: leave out bad files.
        bad: files already known to be bad, listed before those found here.

    Raises:
        BadFilesError: bad files without `skip_bad` (all are listed), or no other files with it.
    """
    found: list[FileContent] = []
    bad = list(bad)
    for path in map(Path, paths):
        if limit is not None and len(found) == limit:
            break
        try:
            found.append(read_file(path, chunk_chars=chunk_chars))
        except OSError as error:
            bad.append(BadFile(path, error.strerror or one_line(error)))
        except ValueError as error:
            bad.append(BadFile(path, str(error).removeprefix(f"{printable(path)}: ")))
    if bad and not skip_bad:
        raise BadFilesError(bad)
    if bad and not found:
        raise BadFilesError(bad, "no file is left to train on:")
    return found, bad

"""Files of several kinds read as lists of ``{"input", "target"}`` items."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

CHUNK_CHARS = 1024
# a text is cut in at least this many chunks, so that a tenth can be set apart
_MIN_CHUNKS = 10

PAIRS = (
    ("input", "target"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("source", "target"),
)
_TEXT_KEYS = ("text", "content")
# said before the prompt where a record has it: Alpaca's input comes after the instruction instead
_BEFORE = ("context", "passage", "body")
_LIST_KEYS = ("examples", "data", "records", "rows")
JSON_SUFFIXES = (".json",)
JSONL_SUFFIXES = (".jsonl", ".ndjson")


def _accepted() -> str:
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    return f"{pairs}, messages, or {' or '.join(_TEXT_KEYS)} alone"


def _to_text(value: object) -> str:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if _is_grid(value):
        return grid_to_text(value)
    if isinstance(value, list) and len(value) == 1:
        return _to_text(value[0])
    return json.dumps(value, ensure_ascii=False)


def _is_grid(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
        and all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    )


def grid_to_text(grid: list[list[int]]) -> str:
    """Rows of digits, one line a row: ``[[1, 0], [0, 2]]`` is ``"10\\n02"``."""
    return "\n".join("".join(map(str, row)) for row in grid)


def text_to_grid(text: str) -> list[list[int]]:
    """The inverse of :func:`grid_to_text`.

    Raises:
        ValueError: a character that is neither a digit nor a line end.
    """
    if not all(character in "0123456789\n" for character in text):
        raise ValueError(f"text: got {text[:40]!r}, takes lines of the digits 0 to 9")
    return [[int(cell) for cell in row] for row in text.split("\n")]


def _from_messages(messages: object) -> dict[str, str] | None:
    if not (isinstance(messages, list) and len(messages) >= 2 and all(isinstance(m, Mapping) for m in messages)):
        return None
    *before, last = messages
    if last.get("role") != "assistant":
        return None
    prompt = "\n".join(f"{m.get('role', 'user')}: {_to_text(m.get('content', ''))}" for m in before)
    return {"input": prompt, "target": _to_text(last.get("content", ""))}


def record_to_item(record: object) -> dict[str, str] | None:
    """``{"input", "target"}`` of one record, or None where it has none of the usual keys (any case)."""
    if isinstance(record, str):
        return {"input": "", "target": _to_text(record)}
    if not isinstance(record, Mapping):
        return None
    fields = {str(key).lower(): value for key, value in record.items() if value is not None}
    if "messages" in fields:
        return _from_messages(fields["messages"])
    for prompt_key, target_key in PAIRS:
        if prompt_key in fields and target_key in fields:
            parts = [_to_text(fields[key]) for key in _BEFORE if key in fields]
            parts.append(_to_text(fields[prompt_key]))
            if prompt_key == "instruction" and fields.get("input"):
                parts.append(_to_text(fields["input"]))
            return {"input": "\n".join(parts), "target": _to_text(fields[target_key])}
    for key in _TEXT_KEYS:
        if key in fields:
            return {"input": "", "target": _to_text(fields[key])}
    return None


def _is_arc(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), list)
        and all(isinstance(pair, Mapping) and _is_grid(pair.get("input")) for pair in value[key])
        for key in ("train", "test")
    )


def _from_arc(path: Path, value: Mapping) -> list[dict]:
    items = []
    for key, split in (("train", "train"), ("test", "validation")):
        for i, pair in enumerate(value[key]):
            # the test outputs of a held-back set are absent
            if split == "validation" and "output" not in pair:
                continue
            if not _is_grid(pair.get("output")):
                raise ValueError(f"{path}: {key}[{i}]: output is not a grid of digits 0 to 9")
            items.append({"input": grid_to_text(pair["input"]), "target": grid_to_text(pair["output"]), "split": split})
    return items


def _from_records(path: Path, records: list, where: str) -> list[dict]:
    items = []
    for i, record in enumerate(records):
        item = record_to_item(record)
        if item is None:
            got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise ValueError(f"{path}: {where} {i + 1}: got {got}, takes the keys {_accepted()}")
        items.append(item)
    return items


def _from_json(path: Path, text: str) -> list[dict]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if _is_arc(value):
        return _from_arc(path, value)
    if isinstance(value, list):
        return _from_records(path, value, "entry")
    if isinstance(value, Mapping):
        for key in _LIST_KEYS:
            if isinstance(value.get(key), list):
                return _from_records(path, value[key], f"{key} entry")
        item = record_to_item(value)
        if item is not None:
            return [item]
        raise ValueError(
            f"{path}: got a JSON object with the keys {sorted(map(str, value))}, takes an ARC task (train and test), "
            f"a list under one of {_LIST_KEYS}, or the keys {_accepted()}"
        )
    raise ValueError(f"{path}: got JSON of type {type(value).__name__}, takes an object or a list")


def _from_jsonl(path: Path, text: str) -> list[dict]:
    records = []
    # only \n ends a record: JSON strings may hold other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: not JSON: {error}") from error
    return _from_records(path, records, "record")


def chunk_text(text: str, chunk_chars: int = CHUNK_CHARS) -> list[dict]:
    """Contiguous chunks of ``text`` as items with an empty ``input``; ``continues`` is true on all but the last.

    A short text is cut finer, in ten chunks where it can be.
    """
    size = max(1, min(chunk_chars, -(-len(text) // _MIN_CHUNKS)))
    starts = range(0, len(text), size)
    return [
        {"input": "", "target": text[i : i + size], "continues": i + size < len(text), "kind": "text"} for i in starts
    ]


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise IsADirectoryError(f"path: {path} is a folder, takes a file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it, or leave it out"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_file(path: str | os.PathLike, *, chunk_chars: int = CHUNK_CHARS) -> list[dict]:
    """Read one file as a list of items with the strings ``input`` and ``target``.

    - ``.json``: an ARC task ``{"train": [{"input", "output"}], "test": [...]}``, grids as lines of digits, test pairs
      with ``"split": "validation"``; ``{"examples": [...]}`` (BIG-Bench Hard); a list of records; one record.
    - ``.jsonl``, ``.ndjson``: a record a line.
    - anything else: UTF-8 text in chunks (:func:`chunk_text`); ``input`` is empty.

    A record has one of the key pairs in ``PAIRS`` (any case), chat ``messages`` that end with the assistant's, or
    ``text`` alone. Line ends become ``\\n``.

    Args:
        path: the file.
        chunk_chars: the longest chunk of a plain text, in characters.

    Raises:
        OSError: the file cannot be read.
        ValueError: not UTF-8, not JSON, or records without the usual keys; the message names file and place.
    """
    if chunk_chars < 1:
        raise ValueError(f"chunk_chars: got {chunk_chars}, takes at least 1")
    path = Path(path)
    text = _read_text(path)
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return _from_json(path, text)
    if suffix in JSONL_SUFFIXES:
        return _from_jsonl(path, text)
    return chunk_text(text, chunk_chars)

"""Dataset configurations: a JSON list with an entry for each dataset; `//` begins a comment."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.names import one_line, printable

# a string, or a comment up to the end of its line
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*')
_OPTIONAL = ("dataset_config", "split")
KEYS = ("name", "dataset_path", *_OPTIONAL, "num_samples")


@dataclass(frozen=True)
class DatasetConfig:
    """An entry of a configuration.

    Attributes:
        name: of its processor.
        dataset_path: a file or folder, or a dataset of the hub.
        dataset_config: of a dataset of the hub its configuration, of a folder a file (its suffix may be left out) or
            folder in it.
        split: of a dataset of the hub, a folder, or a file that holds several; None: train.
        num_samples: how many of its first examples to take; None: all.
        place: where it stands, for errors.
    """

    name: str
    dataset_path: str
    dataset_config: str | None = None
    split: str | None = None
    num_samples: int | None = None
    place: str = ""

    @classmethod
    def of(cls, entry: Any, place: str) -> "DatasetConfig":
        """An entry as JSON has it.

        Raises:
            ValueError: it is no object, or a key is unknown, missing or of another kind; `place` begins the message.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{place} is {json.dumps(entry)[:40]}; it must be an object with {', '.join(KEYS)}")
        for key in entry:
            if key not in KEYS:
                raise ValueError(f"{place} has the key {key!r}; it must have {', '.join(KEYS)}")
        for key in ("name", "dataset_path"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(f"{place}: {key} is {_said(entry, key)}; it must be a string that is not empty")
        for key in _OPTIONAL:
            if entry.get(key) is not None and (not isinstance(entry[key], str) or not entry[key]):
                raise ValueError(f"{place}: {key} is {_said(entry, key)}; it must be a string, null, or left out")
        count = entry.get("num_samples")
        if count is not None and (type(count) is not int or count < 1):
            said = _said(entry, "num_samples")
            raise ValueError(f"{place}: num_samples is {said}; it must be an integer of at least 1, null, or left out")
        return cls(**entry, place=place)


def _said(entry: dict, key: str) -> str:
    return json.dumps(entry[key])[:60] if key in entry else "missing"


def without_comments(text: str) -> str:
    """JSON with spaces in place of comments: all stays on its line and in its column."""
    return _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else " " * len(m[0]), text)


def read_configs(path: str | Path) -> list[DatasetConfig]:
    """The entries of a configuration file. Paths in it are relative to the working folder.

    Raises:
        OSError: the file cannot be opened.
        ValueError: no JSON, no list, an empty one, or a wrong entry; the message names file, line, entry and key.
    """
    path = Path(path)
    try:
        text = without_comments(path.read_text(encoding="utf-8-sig"))
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{printable(path)}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {one_line(error)}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{printable(path)} must hold a list of objects with {', '.join(KEYS)}, at least one")
    lines = _lines_of_entries(text)
    return [
        DatasetConfig.of(entry, f"{printable(path)}: line {line}, entry {number}")
        for number, (entry, line) in enumerate(zip(entries, lines, strict=True), 1)
    ]


def _lines_of_entries(text: str) -> Sequence[int]:
    """The line on which each entry of the list begins."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    lines: list[int] = []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text[at] == "]":
            return lines
        lines.append(1 + text.count("\n", 0, at))
        _, at = decoder.raw_decode(text, at)


def display_names(configs: Sequence[DatasetConfig]) -> list[str]:
    """A name for each dataset: that of its processor, and where several have one, more of it."""
    forms = (
        lambda c: c.name,
        lambda c: f"{c.name}/{c.dataset_config or Path(c.dataset_path).stem}",
        lambda c: f"{c.name}/{c.dataset_path}" + "".join(f"/{part}" for part in (c.dataset_config, c.split) if part),
    )
    names = [forms[0](c) for c in configs]
    for form in forms[1:]:
        names = [form(c) if names.count(name) > 1 else name for c, name in zip(configs, names, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({1 + names[:i].count(name)})" for i, name in enumerate(names)]

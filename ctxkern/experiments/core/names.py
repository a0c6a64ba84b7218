"""Names of files, which may be any bytes: as one line of text, in JSON, and for libraries that open UTF-8 only."""

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def _escape(character: str) -> str:
    code = ord(character)
    # a byte of a file name that is not UTF-8 (PEP 383)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return character.encode("unicode_escape").decode("ascii")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def printable(name: str | os.PathLike) -> str:
    """`name` with control characters, undecodable bytes and lone surrogates as escapes (`\\n`, `\\xff`)."""
    text = os.fsdecode(name)
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def shell_quote(name: str | os.PathLike) -> str:
    """`name` as one word of a shell's command line; bash, zsh and ksh read the escaped form."""
    text = os.fsdecode(name)
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def path_to_json(path: str | os.PathLike) -> str:
    """`path` as a string of JSON that `path_from_json` reads back to the same bytes under any locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def path_from_json(text: str) -> Path:
    """The inverse of `path_to_json`."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


@contextlib.contextmanager
def utf8_alias(folder: Path) -> Iterator[Path]:
    """`folder`, or while the context lasts a symbolic link to it, where its name is not UTF-8."""
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as temporary:
            link = Path(temporary, "folder")
            link.symlink_to(os.path.abspath(folder), target_is_directory=True)
            yield link
    else:
        yield folder


def join_names(names: Sequence[str], most: int = 6) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def group_notes(notes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that each note is about, from (name, note) pairs."""
    names: dict[str, list[str]] = {}
    for name, note in notes:
        names.setdefault(note, []).append(name)
    return names


def one_line(message: object) -> str:
    """`message` without line ends, fit for an error of one line."""
    return " ".join(str(message).split())

"""Names of files as text for one line: on a terminal, in a plot, in a log."""

import os
import shlex


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


def one_line(message: object) -> str:
    """`message` without line ends, fit for an error of one line."""
    return " ".join(str(message).split())

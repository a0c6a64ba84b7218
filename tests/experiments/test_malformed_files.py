"""Files that cannot be trained on, and what is said about each.

Run as a script it prints the table of `ctxkern/experiments/core/data/README.md`, which a test compares:

    python tests/experiments/test_malformed_files.py > ctxkern/experiments/core/data/README.md
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.paths import find_files
from ctxkern.experiments.core.data.reading import BadFilesError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other words for these")

README = Path(__file__).parents[2] / "ctxkern" / "experiments" / "core" / "data" / "README.md"


def link(target):
    return lambda path: path.symlink_to(target)


def chat(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


def arc(**task):
    return json.dumps({"train": [{"input": [[1]], "output": [[2]]}], "test": []} | task)


ARC_RAGGED = {"input": [[1, 2], [3]], "output": [[2]]}
ARC_COLOURS = {"input": [[1]], "output": [[11]]}
IMAGE = [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": "u"}]
NOT_TEXT = "it is binary, damaged, or in an encoding other than UTF-8, UTF-16 and UTF-32"
NUL = "holds a NUL character (at position {}): " + NOT_TEXT
NOT_UTF8 = "not UTF-8 text (byte 0x{:02x} at offset {}); convert it, or leave it out"
GRID = "must be a grid: rows of equal length of the integers 0 to 9"
KEYS = (
    "it must have input/target, instruction/output, instruction/response, input/output, prompt/completion, "
    "prompt/response, question/answer, question/answerkey, query/answer, query/response, problem/solution, "
    "source/target, messages, or text or content alone"
)
OR_LIST = ", or be an ARC task (train and test), or hold a list under one of examples, data, records, rows, instances"

# what it is, name, content (or what makes it), the reason
MALFORMED = [
    ("an empty file", "a.txt", "", "it is empty"),
    ("blank lines only", "a.jsonl", "\n\n", "it has no examples"),
    ("an empty list", "a.json", "[]", "it has no examples"),
    ("Latin-1", "a.txt", b"caf\xe9", NOT_UTF8.format(0xE9, 3)),
    ("UTF-8 cut within a character", "a.txt", b"caf\xc3", NOT_UTF8.format(0xC3, 3)),
    ("UTF-16 cut within a character", "a.txt", b"\xff\xfea\0b", NOT_UTF8.format(0x62, 2).replace("UTF-8", "UTF-16-LE")),
    ("text with a NUL", "a.txt", b"some text\0 and more", NUL.format(9)),
    ("zeros", "a.txt", bytes(64), NUL.format(0)),
    ("integers of 32 bits", "a.txt", bytes([1, 0, 0, 0, 2, 0, 0, 0]), NUL.format(1)),
    ("control characters", "a.txt", bytes(range(1, 32)), "holds many control characters: " + NOT_TEXT),
    ("an image", "a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\r", NOT_UTF8.format(0x89, 0)),
    ("a NUL in JSON", "a.jsonl", '{"text": "a\\u0000b"}', "line 1: the text of its target holds a NUL character"),
    (
        "Python, not JSON",
        "a.json",
        "{'a': 1}",
        "line 1, column 2: not JSON: Expecting property name enclosed in double quotes",
    ),
    ("JSON cut short", "a.json", '[{"text": "a"', "line 1, column 14: not JSON: Expecting ',' delimiter"),
    (
        "jsonl named .json",
        "a.json",
        '{"text": "a"}\n{"text": "b"}',
        "line 2, column 1: not JSON: Extra data (one record per line is the suffix .jsonl)",
    ),
    (
        "a bad line",
        "a.jsonl",
        '{"text": "x"}\n{oops\n',
        "line 2, column 2: not JSON: Expecting property name enclosed in double quotes",
    ),
    ("100,000 brackets", "a.json", "[" * 100_000, "line 1: JSON nested too deeply to read"),
    ("deep JSON on a line", "a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "line 2: JSON nested too deeply to read"),
    (
        "an integer of 5,000 digits",
        "a.json",
        '[\n{"input": "a", "target": ' + "9" * 5000 + "}]",
        "line 2: an integer of more than 4300 digits",
    ),
    (
        "such an integer on a line",
        "a.jsonl",
        '{"text": "x"}\n{"text": ' + "9" * 5000 + "}",
        "line 2: an integer of more than 4300 digits",
    ),
    ("a number", "a.json", "3", "its JSON is of the type int; it must be an object or a list"),
    (
        "a list of numbers",
        "a.json",
        "[1, 2]",
        "entry 1: it is of the type int; it must be an object with the keys " + KEYS.partition("have ")[2],
    ),
    ("unknown keys", "a.jsonl", '{"text": "x"}\n{"foo": "x"}', f"line 2: it has the keys foo; {KEYS}"),
    ("an object of unknown keys", "a.json", '{"foo": 1}', f"it has the keys foo; {KEYS}{OR_LIST}"),
    (
        "a null target",
        "a.jsonl",
        '{"input": "a", "target": null}',
        f"line 1: it has the keys input, target (null); {KEYS}",
    ),
    (
        "choices without labels",
        "a.jsonl",
        '{"question": "a", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"}',
        "line 1: its choices have 1 labels and 2 texts; they must be as many",
    ),
    (
        "a chat that ends with the user",
        "a.jsonl",
        chat(("assistant", "r"), ("user", "q")),
        "line 1: messages end with the role 'user'; the last one must be the assistant's",
    ),
    (
        "a chat without an answer",
        "a.jsonl",
        chat(("user", "q"), ("assistant", None)),
        "line 1: messages end with an assistant's message without content",
    ),
    (
        "a chat with an image",
        "a.jsonl",
        chat(("user", IMAGE), ("assistant", "r")),
        "line 1: message 1 has a part of the kind 'image_url'; only text can be read",
    ),
    (
        "a chat of strings",
        "a.jsonl",
        '{"messages": ["q", "r"]}',
        "line 1: messages must be a list of two or more objects with role and content",
    ),
    ("an ARC colour of 11", "a.json", arc(train=[ARC_COLOURS]), f"train[0]: its output {GRID}"),
    ("an ARC grid of unequal rows", "a.json", arc(test=[ARC_RAGGED]), f"test[0]: its input {GRID}"),
    (
        "a bad ARC task among many",
        "a.json",
        f'{{"x": {arc()}, "y": {arc(train=[ARC_COLOURS])}}}',
        f"task y, train[0]: its output {GRID}",
    ),
    ("a dangling symbolic link", "a.txt", link("gone"), "a symbolic link to gone, which does not exist"),
    (
        "a symbolic link to itself",
        "a.txt",
        link("a.txt"),
        "a symbolic link that leads nowhere: Too many levels of symbolic links",
    ),
    ("a named pipe", "a.txt", os.mkfifo, "not a regular file (a pipe, socket or device)"),
    ("an empty folder", "a", Path.mkdir, "the folder has no file of a known kind"),
    ("a file that fails when read", "a.txt", link("/proc/self/mem"), "Input/output error"),
    ("nothing", "a.txt", lambda path: None, "there is no file, folder or match of this name"),
]


def reason_for(folder, name, content):
    """What is said about the file `name` of `content`."""
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = find_files([path])
    with pytest.raises(BadFilesError) as error:
        MultiFileDataset(found.files, bad=found.bad)
    (bad,) = error.value.files
    assert str(error.value) == f"{path}: {bad.reason}"
    assert "\n" not in bad.reason
    return bad.reason


@pytest.mark.parametrize(("name", "content", "reason"), [pytest.param(*case[1:], id=case[0]) for case in MALFORMED])
def test_malformed_files_are_named_with_the_reason(tmp_path, name, content, reason):
    got = reason_for(tmp_path, name, content)
    # that of an empty folder ends with all suffixes
    assert got.startswith(reason) if content is Path.mkdir else got == reason


def table():
    """The README of the data package."""
    lines = [
        "# Files that cannot be trained on",
        "",
        "What `ctxkern train` says about each, after the file's name. All bad files are listed at once (exit status",
        "2); with `--skip-bad` they are listed and left out. This table is what",
        "`python tests/experiments/test_malformed_files.py` prints.",
        "",
        "| file | name | what is said |",
        "|---|---|---|",
    ]
    for title, name, content, _ in MALFORMED:
        with tempfile.TemporaryDirectory() as folder:
            reason = reason_for(Path(folder), name, content)
        reason = reason if len(reason) <= 160 else f"{reason[:150]}…"
        lines.append(f"| {title} | `{name}` | {reason.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_readme_is_what_is_said():
    assert README.read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    print(table(), end="")

"""Which files a run trains on."""

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctxkern.experiments.core.data.reading import BadFile, BadFilesError
from ctxkern.experiments.core.names import one_line, printable

SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".txt", ".text", ".md", ".rst", ".tex", ".csv", ".tsv", ".html", ".xml"),
    *(".yaml", ".yml", ".toml", ".ini", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java"),
    *(".js", ".ts", ".rb", ".sh", ".sql", ".lua", ".pl", ".r", ".jl"),
)
# long enough to set a tenth apart, short enough for a minute's training
_SOURCE_BYTES = range(20_000, 60_000)
_HIDDEN = (".", "__pycache__")


@dataclass
class FoundFiles:
    """What `find_files` found: files in order, bad entries, and notes (name, reason) on entries that are left out."""

    files: list[Path] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(folder: Path, found: FoundFiles) -> Iterator[Path]:
    """Files in `folder` and below, through symbolic links, each folder once."""

    def unreadable(error: OSError) -> None:
        found.bad.append(BadFile(Path(error.filename), f"a folder that cannot be read: {error.strerror}"))

    seen = {_identity(folder)}
    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        below = []
        for name in sorted(folders):
            path = Path(root, name)
            if name.startswith(_HIDDEN):
                continue
            identity = _identity(path)
            if identity in seen:
                found.notes.append((printable(path), "a link to a folder that is read already"))
            else:
                seen.add(identity)
                below.append(name)
        folders[:] = below
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _in_folder(folder: Path, found: FoundFiles) -> list[Path]:
    files: list[Path] = []
    others: Counter[str] = Counter()
    for path in sorted(_walk(folder, found)):
        if path.suffix.lower() not in SUFFIXES:
            others[path.suffix.lower() or "no suffix"] += 1
            continue
        try:
            if path.stat().st_size:
                files.append(path)
            else:
                found.notes.append((printable(path), "it is empty"))
        except OSError as error:
            found.bad.append(BadFile(path, _link_problem(path) or one_line(error.strerror or error)))
    if others:
        kinds = ", ".join(f"{count} {printable(suffix)}" for suffix, count in sorted(others.items()))
        found.notes.append((printable(folder), f"files of other kinds ({kinds})"))
    return files


def _link_problem(path: Path) -> str:
    """What is wrong with `path` if it is a symbolic link that leads nowhere."""
    if not path.is_symlink():
        return ""
    try:
        path.stat()
    except FileNotFoundError:
        return f"a symbolic link to {printable(os.readlink(path))}, which does not exist"
    except OSError as error:
        return f"a symbolic link that leads nowhere: {error.strerror}"
    return ""


def find_files(paths: Sequence[str | os.PathLike]) -> FoundFiles:
    """The files that `paths` name, each once, in the order given.

    A file stands for itself, a folder for the files in it and below with a suffix of `SUFFIXES` (sorted, symbolic links
    followed; hidden ones are left out, empty ones and other kinds are noted), anything else is a glob pattern (`**` is
    any depth). A path that is none of these is a bad file.
    """
    found = FoundFiles()
    seen: dict[tuple[int, int], Path] = {}
    for entry in map(os.fspath, paths):
        path = Path(entry)
        files: list[Path] = []
        if os.path.isdir(path):
            before = len(found.bad)
            files = _in_folder(path, found)
            if not files and len(found.bad) == before:
                found.bad.append(BadFile(path, f"the folder has no file of a known kind ({' '.join(SUFFIXES)})"))
        elif os.path.exists(path):
            files = [path]
        elif os.path.lexists(path):
            found.bad.append(BadFile(path, _link_problem(path)))
        elif glob.has_magic(entry):
            matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True)) if not os.path.isdir(match)]
            files = [match for match in matches if match.exists()]
            found.bad += [BadFile(match, _link_problem(match)) for match in matches if not match.exists()]
            if not matches:
                found.bad.append(BadFile(path, "no file matches this pattern"))
        else:
            found.bad.append(BadFile(path, "there is no file, folder or match of this name"))
        for file in files:
            first = seen.setdefault(_identity(file), file)
            if first is file:
                found.files.append(file)
            elif os.path.abspath(first) != os.path.abspath(file):
                found.notes.append((printable(file), f"the same file as {printable(first)}"))
    return found


def expand_paths(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files of `find_files`.

    Raises:
        BadFilesError: an entry that is nothing of the kind, a folder or pattern without files.
    """
    found = find_files(paths)
    if found.bad:
        raise BadFilesError(found.bad)
    return found.files


def standard_library_files(count: int = 16) -> list[Path]:
    """`count` source files of the running Python's standard library, evenly spread over its names: a text at hand.

    Raises:
        ValueError: the library has no source files of fitting size.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    fitting = sorted(path for path in folder.glob("[a-z]*.py") if path.stat().st_size in _SOURCE_BYTES)
    if not fitting:
        raise ValueError(f"no paths are given, and {printable(folder)} has no Python source to train on instead")
    count = min(count, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()

"""Which files a run trains on."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".txt", ".text", ".md", ".rst", ".tex", ".csv", ".tsv", ".html", ".xml"),
    *(".yaml", ".yml", ".toml", ".ini", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java"),
    *(".js", ".ts", ".rb", ".sh", ".sql", ".lua", ".pl", ".r", ".jl"),
)
# long enough to set a tenth apart, short enough for a minute's training
_SOURCE_BYTES = range(20_000, 60_000)


def _in_folder(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.stat().st_size)


def expand_paths(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files that ``paths`` name, each once, in the order given.

    A file stands for itself, a folder for the files in it and below with a suffix of ``SUFFIXES`` (sorted; hidden and
    empty ones left out), anything else is a glob pattern (``**`` is any depth).

    Raises:
        ValueError: a path that is nothing of the kind, a folder or pattern without files.
    """
    found: list[Path] = []
    for entry in map(os.fspath, paths):
        path = Path(entry)
        if path.is_dir():
            files = _in_folder(path)
            if not files:
                raise ValueError(f"paths: the folder {entry} has no file of a known kind ({' '.join(SUFFIXES)})")
        elif path.exists():
            files = [path]
        elif glob.has_magic(entry):
            files = [Path(match) for match in sorted(glob.glob(entry, recursive=True)) if os.path.isfile(match)]
            if not files:
                raise ValueError(f"paths: no file matches {entry}")
        else:
            raise ValueError(f"paths: there is no file, folder or match of {entry}")
        found += files
    seen = set()
    return [path for path in found if not (path.resolve() in seen or seen.add(path.resolve()))]


def standard_library_files(count: int = 16) -> list[Path]:
    """``count`` source files of the running Python's standard library, evenly spread over its names: a text at hand.

    Raises:
        ValueError: the library has no source files of fitting size.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    fitting = sorted(path for path in folder.glob("[a-z]*.py") if path.stat().st_size in _SOURCE_BYTES)
    if not fitting:
        raise ValueError(f"paths: got none, and {folder} holds no Python source to train on instead: name some files")
    count = min(count, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

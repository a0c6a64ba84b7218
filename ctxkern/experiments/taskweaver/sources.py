"""Where the records of a dataset come from: a file, a folder, or the hub."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.data.decoding import decode_text
from ctxkern.experiments.core.data.paths import expand_paths
from ctxkern.experiments.core.data.reading import JSON_SUFFIXES, JSONL_SUFFIXES, parse_json, read_bytes
from ctxkern.experiments.core.extras import MissingExtraError, require
from ctxkern.experiments.core.names import one_line, printable
from ctxkern.experiments.taskweaver.configs import DatasetConfig

_SUFFIXES = (*JSON_SUFFIXES, *JSONL_SUFFIXES)
_LISTS = ("examples", "data")


@dataclass
class Records:
    """`rows` with the `places` of each, for errors, and the local `files` that they were read from."""

    rows: list[Any]
    places: list[str]
    files: list[Path] = field(default_factory=list)


def read_records(config: DatasetConfig) -> Records:
    """The records of a dataset, at most `num_samples`.

    Raises:
        MissingExtraError: no file or folder, and `datasets` is not installed, which reads the hub's.
        OSError, ValueError: files, or a dataset of the hub, that cannot be read; one line.
    """
    path = Path(config.dataset_path)
    records = _local(config, path) if path.exists() else _of_hub(config)
    if not records.rows:
        raise ValueError(f"{config.place}: {printable(config.dataset_path)} has no examples; it must have one")
    return records


def local_files(config: DatasetConfig) -> list[Path]:
    """The files that `read_records` reads; none of a dataset of the hub.

    Raises:
        OSError, ValueError: a folder without such files; one line.
    """
    path = Path(config.dataset_path)
    return [file.absolute() for file in _files(config, path)[0]] if path.exists() else []


def _files(config: DatasetConfig, path: Path) -> tuple[list[Path], bool]:
    """The files of a path, and whether they were chosen by their split."""
    if path.is_dir():
        return _in_folder(config, path)
    if config.dataset_config is not None:
        raise ValueError(f"{config.place}: dataset_config is {config.dataset_config!r}; a file has none")
    return [path], False


def _local(config: DatasetConfig, path: Path) -> Records:
    files, split_done = _files(config, path)
    records = Records([], [], [file.absolute() for file in files])
    for file in files:
        for place, row in _of_file(config, file, split_done):
            records.rows.append(row)
            records.places.append(f"{printable(file)}: {place}")
            if len(records.rows) == config.num_samples:
                return records
    return records


def _in_folder(config: DatasetConfig, folder: Path) -> tuple[list[Path], bool]:
    """The files of a folder, and whether they were chosen by their split."""
    if config.dataset_config is not None:
        inner = [folder / f"{config.dataset_config}{suffix}" for suffix in ("", *_SUFFIXES)]
        found = next((path for path in inner if path.exists()), None)
        if found is None:
            where = f"{printable(folder)} has no such file or folder"
            raise ValueError(f"{config.place}: dataset_config is {config.dataset_config!r}; {where}")
        if found.is_file():
            return [found], False
        folder = found
    files = [path for path in expand_paths([folder]) if path.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"{config.place}: {printable(folder)} has no file of {' '.join(_SUFFIXES)}; it must have one")
    of_split = [path for path in files if path.stem.lower() == (config.split or "train").lower()]
    if config.split is not None and not of_split and len(files) > 1:
        names = ", ".join(path.name for path in files[:6])
        raise ValueError(
            f"{config.place}: split is {config.split!r}; it must be a file of {printable(folder)}: {names}"
        )
    return (of_split, True) if of_split else (files, False)


def _of_file(config: DatasetConfig, path: Path, split_done: bool) -> Iterator[tuple[str, Any]]:
    """The (place, record) pairs of a file."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{printable(path)} has the suffix {suffix!r}; it must be one of {' '.join(_SUFFIXES)}")
    split = config.split
    try:
        text, _ = decode_text(read_bytes(path))
        if suffix in JSONL_SUFFIXES:
            _check_split(split, path, split_done)
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield f"line {number}", parse_json(line, number)
            return
        value = parse_json(text)
        if isinstance(value, dict):
            key = next((key for key in (split or "train", *_LISTS) if isinstance(value.get(key), list)), None)
            if key is None:
                have = ", ".join(map(str, value)) or "none"
                raise ValueError(f"its JSON has the keys {have}; it must be a list, or have one under examples or data")
            split_done = split_done or key == split
            value = value[key]
        if not isinstance(value, list):
            raise ValueError(f"its JSON is of the type {type(value).__name__}; it must be a list or an object")
        _check_split(split, path, split_done)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {one_line(error)}") from error
    yield from ((f"entry {number}", row) for number, row in enumerate(value, 1))


def _check_split(split: str | None, path: Path, split_done: bool) -> None:
    """A file without splits is all `train`, or the split of its name."""
    if not split_done and split not in (None, "train") and split.lower() != path.stem.lower():  # type: ignore[union-attr]
        raise ValueError(f"split is {split!r}, and the file has no splits; it must be left out")


def _of_hub(config: DatasetConfig) -> Records:
    name = printable(config.dataset_path)
    if config.dataset_path.startswith((".", "/", "~")) or Path(name).suffix.lower() in _SUFFIXES:
        raise ValueError(f"{config.place}: dataset_path is {name}; there is no such file or folder")
    split = config.split or "train"
    try:
        datasets = require("datasets", "hub")
    except MissingExtraError as error:
        where = f"{config.place}: dataset_path is {name}, which is no file or folder here"
        raise MissingExtraError(f"{where}; for the hub, {error}") from error
    try:
        found = datasets.load_dataset(config.dataset_path, config.dataset_config, split=split)
        count = len(found) if config.num_samples is None else min(config.num_samples, len(found))
        rows = [found[i] for i in range(count)]
    except Exception as error:
        # of many kinds: no network, no such dataset, configuration or split
        reason = one_line(error)[:300] or type(error).__name__
        raise ValueError(
            f"{config.place}: dataset_path is {name}, which is no file or folder here, and the hub gave none: {reason}"
        ) from error
    return Records(rows, [f"{name}, {split}: example {i}" for i in range(1, count + 1)])

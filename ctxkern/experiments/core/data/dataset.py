"""The items of several files, each with the id of its file and its split."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ctxkern.experiments.core.data.reading import CHUNK_CHARS, BadFile, read_files
from ctxkern.experiments.core.names import join_names, path_to_json, printable
from ctxkern.experiments.core.seeding import generator

SPLITS = ("train", "validation")


def display_names(paths: Sequence[Path]) -> list[str]:
    """Printable names of files, with as many of their last folders as it takes to tell them apart."""
    # decoded alike under any locale: a resumed run knows files by these names
    resolved = [Path(path_to_json(os.path.abspath(path))) for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in resolved), default=0)):
        names = [printable("/".join(path.parts[-depth:])) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            break
    else:
        # names that differ in bytes and look alike
        names = [printable(path.name) for path in resolved]
    # a file given twice
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


class MultiFileDataset(Dataset):
    """The items of several files, each with the id of its file: its position in `file_paths`.

    Every item belongs to the split `"train"` or `"validation"`: the test pairs of an ARC task are validation, of a
    text its last chunks, of other examples a seeded choice. A file of one item has no validation.

    Args:
        file_paths: paths of files that `load_file` reads.
        val_fraction: share of a file's items set apart, at least one where the file has two; 0 sets none apart.
        seed: of the choice.
        chunk_chars: the longest chunk of a plain text.
        limit: how many files to use, the first ones; None uses all.
        skip_bad: leave out files that cannot be read. `skipped` lists them, and `file_paths` holds the others.
        bad: files already known to be bad.

    Items are `{"input": str, "target": str, "file_id": int}`. `file_names` are distinct and printable, `checksums` the
    SHA-256 of each file, and `notes` what of each file is not used.

    Raises:
        BadFilesError: files that cannot be read, all of them at once.
        ValueError: no paths; `val_fraction` not in [0, 1).
        TypeError: `file_paths` is a single path.
    """

    def __init__(
        self,
        file_paths: Sequence[str | os.PathLike],
        *,
        val_fraction: float = 0.1,
        seed: int = 0,
        chunk_chars: int = CHUNK_CHARS,
        limit: int | None = None,
        skip_bad: bool = False,
        bad: Sequence[BadFile] = (),
    ):
        if isinstance(file_paths, str | os.PathLike):
            raise TypeError(f"file_paths is the single path {os.fspath(file_paths)!r}; it must be a sequence of paths")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
        if not file_paths and not bad:
            raise ValueError("file_paths is empty; it must have at least one path")
        contents, self.skipped = read_files(
            file_paths, chunk_chars=chunk_chars, limit=limit, skip_bad=skip_bad, bad=bad
        )
        self.file_paths = [content.path for content in contents]
        self.file_names = display_names(self.file_paths)
        self.checksums = [content.sha256 for content in contents]
        self.notes = [content.notes for content in contents]
        self.data: list[dict] = []
        self.file_ids: list[int] = []
        self.splits: list[str] = []
        for file_id, content in enumerate(contents):
            self.data.extend(content.items)
            self.file_ids.extend([file_id] * len(content.items))
            self.splits.extend(_split(content.items, val_fraction, seed, file_id))

    @property
    def num_files(self) -> int:
        """How many files the items are from, variants of `augmented` included."""
        return len(self.file_names)

    def indices(self, split: str) -> list[int]:
        """Positions of the items of `split`, for `torch.utils.data.Subset`."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
        return [i for i, name in enumerate(self.splits) if name == split]

    def texts(self, split: str = "train") -> list[str]:
        """Inputs and targets of `split`: what a vocabulary is taken from."""
        return [self.data[i][key] for i in self.indices(split) for key in ("input", "target")]

    def alone(self, name: str) -> "MultiFileDataset":
        """The file `name` by itself, with the split that it has among the others.

        Raises:
            ValueError: no file is called so.
        """
        if name not in self.file_names:
            raise ValueError(f"only is {name!r}; it must be one of the files: {join_names(self.file_names, 20)}")
        file_id, one = self.file_names.index(name), copy.copy(self)
        for field in ("file_paths", "file_names", "checksums", "notes"):
            setattr(one, field, getattr(self, field)[file_id : file_id + 1])
        kept = [i for i, other in enumerate(self.file_ids) if other == file_id]
        one.data, one.splits = ([values[i] for i in kept] for values in (self.data, self.splits))
        one.file_ids = [0] * len(kept)
        return one

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> dict:
        item = self.data[idx]
        return {"input": item["input"], "target": item["target"], "file_id": self.file_ids[idx]}


def _split(items: Sequence[Mapping], val_fraction: float, seed: int, file_id: int) -> list[str]:
    if any("split" in item for item in items):
        return [item["split"] for item in items]
    n = len(items)
    held = min(n - 1, max(1, round(val_fraction * n))) if n > 1 and val_fraction > 0 else 0
    if items[0].get("kind") == "text":
        chosen = set(range(n - held, n))
    else:
        chosen = set(torch.randperm(n, generator=generator(seed, "split", file_id, n))[:held].tolist())
    return ["validation" if i in chosen else "train" for i in range(n)]

"""From files to batches: items with file ids, encoded windows, padded tensors."""

import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.core.tokenizers import Tokenizer
from ctxkern.experiments.multifile.files import CHUNK_CHARS, load_file

IGNORE_INDEX = -100
LOSSES = ("target", "all")
SPLITS = ("train", "validation")

__all__ = ["Collator", "EncodedDataset", "MultiFileDataset", "build_sequence", "load_file"]


def _display_names(paths: Sequence[Path]) -> list[str]:
    # as many trailing folders as it takes to tell them apart
    resolved = [Path(os.path.abspath(path)) for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in resolved), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            break
    # a file given twice
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


class MultiFileDataset(Dataset):
    """The items of several files, each with the id of its file: its position in ``file_paths``.

    Every item belongs to the split ``"train"`` or ``"validation"``: the test pairs of an ARC task are validation, of a
    text its last chunks, of other examples a seeded choice. A file of one item has no validation.

    Args:
        file_paths: paths of files that :func:`load_file` reads.
        val_fraction: share of a file's items set apart, at least one where the file has two; 0 sets none apart.
        seed: of the choice.
        chunk_chars: the longest chunk of a plain text.

    Items are ``{"input": str, "target": str, "file_id": int}``.

    Raises:
        OSError, ValueError: from :func:`load_file`; no paths; a file without items; ``val_fraction`` not in [0, 1).
    """

    def __init__(
        self,
        file_paths: Sequence[str | os.PathLike],
        *,
        val_fraction: float = 0.1,
        seed: int = 0,
        chunk_chars: int = CHUNK_CHARS,
    ):
        if isinstance(file_paths, str | os.PathLike):
            raise TypeError(f"file_paths: got the single path {os.fspath(file_paths)!r}, takes a sequence of paths")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: got {val_fraction}, takes a share in [0, 1)")
        self.file_paths = [Path(path) for path in file_paths]
        if not self.file_paths:
            raise ValueError("file_paths: got no path, takes at least one")
        self.file_names = _display_names(self.file_paths)
        self.data: list[dict] = []
        self.file_ids: list[int] = []
        self.splits: list[str] = []
        for file_id, path in enumerate(self.file_paths):
            items = load_file(path, chunk_chars=chunk_chars)
            if not items:
                raise ValueError(f"file_paths: {path} has no examples")
            self.data.extend(items)
            self.file_ids.extend([file_id] * len(items))
            self.splits.extend(_split(items, val_fraction, seed, file_id))

    @property
    def num_files(self) -> int:
        return len(self.file_paths)

    def indices(self, split: str) -> list[int]:
        """Positions of the items of ``split``, for ``torch.utils.data.Subset``."""
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, takes one of {SPLITS}")
        return [i for i, name in enumerate(self.splits) if name == split]

    def texts(self, split: str = "train") -> list[str]:
        """Inputs and targets of ``split``: what a vocabulary is taken from."""
        return [self.data[i][key] for i in self.indices(split) for key in ("input", "target")]

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


def build_sequence(tokenizer: Tokenizer, prompt: str, target: str, *, end: bool = True) -> tuple[list[int], int]:
    """Ids of ``prompt + <sep> + target + <eos>`` (no ``<eos>`` unless ``end``) and the index of the first target id."""
    head = [*tokenizer.encode(prompt), tokenizer.sep_id]
    tail = [tokenizer.eos_id] if end else []
    return [*head, *tokenizer.encode(target), *tail], len(head)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, takes one of {LOSSES}")


def _window(ids: torch.Tensor, start: int, stop: int, first_label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``ids[start:stop]`` and the next ids as labels, -100 before position ``first_label`` of ``ids``."""
    labels = ids[start + 1 : stop + 1].to(torch.int64, copy=True)
    unlabelled = min(max(first_label - start - 1, 0), len(labels))
    labels[:unlabelled] = IGNORE_INDEX
    return ids[start:stop].to(torch.int64), labels


def _anchor(target_start: int, seq_len: int, reserve: int) -> int:
    """Start of the window in which the target begins: ``reserve`` labels of it fit, whatever its own length.

    A window placed by the end of the sequence would tell the length of the answer by where the answer starts.
    """
    return max(0, target_start - 1 + reserve - seq_len)


def _cuts(pairs: int, target_start: int, first_label: int, seq_len: int, reserve: int) -> list[tuple[int, int, int]]:
    """(start, stop, first label) of the windows of a sequence with ``pairs`` labels; each label lies in one of them."""
    if pairs <= seq_len:
        return [(0, pairs, first_label)]
    anchor = _anchor(target_start, seq_len, reserve)
    # the prompt, where it has labels, backwards from the anchor
    cuts = [(max(stop - seq_len, 0), stop, first_label) for stop in range(anchor, first_label - 1, -seq_len)]
    # a text, which has no prompt, does not look back
    step = seq_len if target_start == 1 else max(seq_len // 2, 1)
    start, labelled = anchor, max(anchor, first_label - 1)
    while labelled < pairs:
        stop = min(start + seq_len, pairs)
        cuts.append((start, stop, labelled + 1))
        start, labelled = start + step, stop
    return sorted(cuts)


class EncodedDataset(Dataset):
    """The items of a :class:`MultiFileDataset` as windows of at most ``seq_len`` tokens.

    A sequence is ``input + <sep> + target + <eos>`` (a text chunk that another follows has no ``<eos>``). Longer ones
    are cut where the answer begins, with as much of the prompt before it as leaves room for the longest answer (at most
    half a window), then in steps of half a window: where an answer starts never tells its length. Each label lies in
    exactly one window, and windows without labels are dropped.

    Args:
        dataset: the items.
        tokenizer: of the ids.
        seq_len: the longest window.
        loss: ``"target"`` labels the target and ``<eos>``, ``"all"`` every token after the first. Where the input is
            empty the two agree.
        split: ``"train"``, ``"validation"``, or None for both.

    Items are ``{"input": [s] int64, "target": [s] int64, "file_id": int}`` with s ≤ ``seq_len``; ``target`` is -100
    where there is no loss.
    """

    def __init__(
        self,
        dataset: MultiFileDataset,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        loss: str = "target",
        split: str | None = None,
    ):
        _check_loss(loss)
        if seq_len < 1:
            raise ValueError(f"seq_len: got {seq_len}, takes at least 1")
        self.seq_len = seq_len
        self.num_files = dataset.num_files
        self.file_names = dataset.file_names
        self.file_ids: list[int] = []
        self.num_labels = 0
        ids = array("i")
        windows: list[tuple[int, int, int]] = []
        # of all items, so that both splits are cut alike
        answers = (len(tokenizer.encode(item["target"])) + 1 for item in dataset.data)
        reserve = min(max(answers, default=1), max(seq_len // 2, 1))
        for i in range(len(dataset)) if split is None else dataset.indices(split):
            item = dataset.data[i]
            sequence, target_start = build_sequence(
                tokenizer, item["input"], item["target"], end=not item.get("continues", False)
            )
            offset, pairs = len(ids), len(sequence) - 1
            first_label = target_start if loss == "target" else 1
            ids.extend(sequence)
            self.num_labels += pairs + 1 - first_label
            for start, stop, first in _cuts(pairs, target_start, first_label, seq_len, reserve):
                windows.append((offset + start, offset + stop, offset + first))
                self.file_ids.append(dataset.file_ids[i])
        self._ids = torch.tensor(ids, dtype=torch.int32)
        self._windows = torch.tensor(windows, dtype=torch.int64).reshape(-1, 3)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def __len__(self) -> int:
        return len(self.file_ids)

    def __getitem__(self, idx: int) -> dict:
        inputs, labels = _window(self._ids, *self._windows[idx].tolist())
        return {"input": inputs, "target": labels, "file_id": self.file_ids[idx]}


class Collator:
    """Lists of items to padded batches.

    Takes the encoded items of :class:`EncodedDataset`, or the text items of :class:`MultiFileDataset`, of which it
    keeps the window in which the target begins (use :class:`EncodedDataset` to lose nothing).

    Args:
        tokenizer: gives the padding id, and encodes text items.
        seq_len: S, the width of every batch.
        loss: as for :class:`EncodedDataset`; of effect on text items only.

    Returns (from a call):
        ``{"input": [B, S] int64, "target": [B, S] int64, -100 where no loss, "file_id": [B] int64,
        "padding_mask": [B, S] bool, True at padding}``; padding is on the right.

    Raises:
        ValueError: no items, or an encoded item longer than ``seq_len``.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, loss: str = "target"):
        _check_loss(loss)
        if seq_len < 1:
            raise ValueError(f"seq_len: got {seq_len}, takes at least 1")
        self.tokenizer, self.seq_len, self.loss = tokenizer, seq_len, loss

    def _encode(self, item: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(item["input"], str):
            if len(item["input"]) > self.seq_len:
                raise ValueError(f"items: got one of {len(item['input'])} tokens, seq_len is {self.seq_len}")
            return item["input"], item["target"]
        sequence, target_start = build_sequence(self.tokenizer, item["input"], item["target"])
        pairs = len(sequence) - 1
        first_label = target_start if self.loss == "target" else 1
        start = _anchor(target_start, self.seq_len, max(self.seq_len // 2, 1)) if pairs > self.seq_len else 0
        return _window(torch.tensor(sequence), start, min(start + self.seq_len, pairs), first_label)

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        if not items:
            raise ValueError("items: got none, takes at least one")
        shape = (len(items), self.seq_len)
        inputs = torch.full(shape, self.tokenizer.pad_id)
        targets = torch.full(shape, IGNORE_INDEX)
        lengths = torch.empty(len(items), dtype=torch.int64)
        for row, item in enumerate(items):
            ids, labels = self._encode(item)
            lengths[row] = len(ids)
            inputs[row, : len(ids)] = ids
            targets[row, : len(ids)] = labels
        return {
            "input": inputs,
            "target": targets,
            "file_id": torch.tensor([item["file_id"] for item in items], dtype=torch.int64),
            "padding_mask": torch.arange(self.seq_len) >= lengths[:, None],
        }

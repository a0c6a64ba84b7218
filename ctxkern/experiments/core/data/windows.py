"""Items as token ids: encoded, cut into windows, padded to batches."""

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import Dataset

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.tokenizers import Tokenizer

IGNORE_INDEX = -100
LOSSES = ("target", "all")


def build_sequence(tokenizer: Tokenizer, prompt: str, target: str, *, end: bool = True) -> tuple[list[int], int]:
    """Ids of `prompt + <sep> + target + <eos>` (no `<eos>` unless `end`) and the index of the first target id."""
    head = [*tokenizer.encode(prompt), tokenizer.sep_id]
    tail = [tokenizer.eos_id] if end else []
    return [*head, *tokenizer.encode(target), *tail], len(head)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {LOSSES}")


def _window(ids: torch.Tensor, start: int, stop: int, first_label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `ids[start:stop]` and the next ids as labels, -100 before position `first_label` of `ids`."""
    labels = ids[start + 1 : stop + 1].to(torch.int64, copy=True)
    unlabelled = min(max(first_label - start - 1, 0), len(labels))
    labels[:unlabelled] = IGNORE_INDEX
    return ids[start:stop].to(torch.int64), labels


def _anchor(target_start: int, seq_len: int, reserve: int) -> int:
    """Start of the window in which the target begins: `reserve` labels of it fit, whatever its own length.

    A window placed by the end of the sequence would tell the length of the answer by where the answer starts.
    """
    return max(0, target_start - 1 + reserve - seq_len)


def _cuts(pairs: int, target_start: int, first_label: int, seq_len: int, reserve: int) -> list[tuple[int, int, int]]:
    """(start, stop, first label) of the windows of a sequence with `pairs` labels; each label lies in one of them."""
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
    """The items of a `MultiFileDataset` as windows of at most `seq_len` tokens.

    A sequence is `input + <sep> + target + <eos>` (a text chunk that another follows has no `<eos>`). Longer ones
    are cut where the answer begins, with as much of the prompt before it as leaves room for the longest answer of its
    file (at most half a window), then in steps of half a window: where an answer starts never tells its length. Each
    label lies in exactly one window, and windows without labels are dropped.

    Args:
        dataset: the items.
        tokenizer: of the ids.
        seq_len: the longest window.
        loss: `"target"` labels the target and `<eos>`, `"all"` every token after the first. Where the input is
            empty the two agree.
        split: `"train"`, `"validation"`, or None for both.

    Items are `{"input": [s] int64, "target": [s] int64, "file_id": int}` with s ≤ `seq_len`; `target` is -100
    where there is no loss. `num_labels` are the labelled tokens; `cut_prompts` has, for each file that has any, how
    many prompts begin before the window of their answer; `answers` says of each window whether it has a whole answer to
    a prompt.
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
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        self.seq_len = seq_len
        self.num_files = dataset.num_files
        self.file_names = dataset.file_names
        # the others are variants
        self.num_sources = len(dataset.file_paths)
        self.file_ids: list[int] = []
        self.num_labels = 0
        self.cut_prompts: dict[int, int] = {}
        self.answers: list[bool] = []
        ids = array("i")
        windows: list[tuple[int, int, int]] = []
        # of all items, so that both splits are cut alike
        reserve = dict.fromkeys(range(dataset.num_files), 1)
        for file_id, item in zip(dataset.file_ids, dataset.data, strict=True):
            answer = len(tokenizer.encode(item["target"])) + 1
            reserve[file_id] = min(max(reserve[file_id], answer), max(seq_len // 2, 1))
        for i in range(len(dataset)) if split is None else dataset.indices(split):
            item, file_id = dataset.data[i], dataset.file_ids[i]
            sequence, target_start = build_sequence(
                tokenizer, item["input"], item["target"], end=not item.get("continues", False)
            )
            offset, pairs = len(ids), len(sequence) - 1
            first_label = target_start if loss == "target" else 1
            ids.extend(sequence)
            self.num_labels += pairs + 1 - first_label
            if pairs > seq_len and target_start > 1 and _anchor(target_start, seq_len, reserve[file_id]) > 0:
                self.cut_prompts[file_id] = self.cut_prompts.get(file_id, 0) + 1
            for start, stop, first in _cuts(pairs, target_start, first_label, seq_len, reserve[file_id]):
                windows.append((offset + start, offset + stop, offset + first))
                self.file_ids.append(file_id)
                self.answers.append(target_start > 1 and first <= target_start and stop == pairs)
        self._ids = torch.tensor(ids, dtype=torch.int32)
        self._windows = torch.tensor(windows, dtype=torch.int64).reshape(-1, 3)

    @property
    def num_tokens(self) -> int:
        """How many there are in all windows, those of two windows twice."""
        return int((self._windows[:, 1] - self._windows[:, 0]).sum())

    def __len__(self) -> int:
        return len(self.file_ids)

    def __getitem__(self, idx: int) -> dict:
        inputs, labels = _window(self._ids, *self._windows[idx].tolist())
        return {"input": inputs, "target": labels, "file_id": self.file_ids[idx]}


class Collator:
    """Lists of items to padded batches.

    Takes the encoded items of `EncodedDataset`, or the text items of `MultiFileDataset`, of which it
    keeps the window in which the target begins (use `EncodedDataset` to lose nothing).

    Args:
        tokenizer: gives the padding id, and encodes text items.
        seq_len: the longest sequence.
        loss: as for `EncodedDataset`; of effect on text items only.
        longest: whether a batch is as wide as its longest sequence; else all are `seq_len` wide.

    Returns (from a call):
        `{"input": [B, S] int64, "target": [B, S] int64, -100 where no loss, "file_id": [B] int64,
        "padding_mask": [B, S] bool, True at padding}`; padding is on the right.

    Raises:
        ValueError: no items, or an encoded item longer than `seq_len`.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, loss: str = "target", *, longest: bool = False):
        _check_loss(loss)
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        self.tokenizer, self.seq_len, self.loss, self.longest = tokenizer, seq_len, loss, longest

    def _encode(self, item: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(item["input"], str):
            if len(item["input"]) > self.seq_len:
                raise ValueError(
                    f"an item has {len(item['input'])} tokens; it must have at most seq_len = {self.seq_len}"
                )
            return item["input"], item["target"]
        sequence, target_start = build_sequence(self.tokenizer, item["input"], item["target"])
        pairs = len(sequence) - 1
        first_label = target_start if self.loss == "target" else 1
        start = _anchor(target_start, self.seq_len, max(self.seq_len // 2, 1)) if pairs > self.seq_len else 0
        return _window(torch.tensor(sequence), start, min(start + self.seq_len, pairs), first_label)

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        if not items:
            raise ValueError("items is empty; it must have at least one item")
        encoded = [self._encode(item) for item in items]
        lengths = torch.tensor([len(ids) for ids, _ in encoded])
        width = int(lengths.max()) if self.longest else self.seq_len
        inputs = torch.full((len(items), width), self.tokenizer.pad_id)
        targets = torch.full((len(items), width), IGNORE_INDEX)
        for row, (ids, labels) in enumerate(encoded):
            inputs[row, : len(ids)] = ids
            targets[row, : len(ids)] = labels
        return {
            "input": inputs,
            "target": targets,
            "file_id": torch.tensor([item["file_id"] for item in items], dtype=torch.int64),
            "padding_mask": torch.arange(width) >= lengths[:, None],
        }

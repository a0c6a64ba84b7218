"""Examples of several datasets, and their batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.core.names import one_line
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.taskweaver.configs import DatasetConfig, display_names, read_configs
from ctxkern.experiments.taskweaver.processors import (
    MAX_LENGTH,
    Columns,
    DatasetProcessor,
    EmptyTextError,
    register_processor,
    registered,
)
from ctxkern.experiments.taskweaver.sources import Records, read_records

__all__ = ["Collator", "DatasetCreator", "DatasetProcessor", "TaskDataset", "create_dataset", "register_processor"]

Configs = str | Path | Sequence[DatasetConfig | Mapping[str, Any]]


class TaskDataset(Dataset):
    """The examples of datasets, each with the number of its dataset.

    Items are `{"input_ids": [s] int64, "labels": [s] int64, -100 on the prompt, "prompt_length": int, "file_id": int}`.

    Attributes:
        names: of the datasets, by number.
        file_ids: the number of each example's dataset.
        files: the local files that were read.
        notes: (dataset, what was cut) pairs.
        answers: of each dataset, by number, its processor's `answer`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.file_ids: list[int] = []
        self.files: list[Path] = []
        self.notes: list[tuple[str, str]] = []
        self.answers: list[Callable[[str], str]] = []
        self._rows: list[tuple[Tensor, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        ids, length = self._rows[idx]
        labels = ids.clone()
        labels[:length] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "prompt_length": length, "file_id": self.file_ids[idx]}

    def length(self, idx: int) -> int:
        """The tokens of an example."""
        return len(self._rows[idx][0])

    def longest(self) -> int:
        """The tokens of the longest example."""
        return max(map(self.length, range(len(self))), default=0)

    def prompt(self, idx: int) -> Tensor:
        """The ids [s] of an example's prompt."""
        ids, length = self._rows[idx]
        return ids[:length]

    def add(
        self, name: str, columns: Columns, files: Sequence[Path] = (), answer: Callable[[str], str] = str.strip
    ) -> None:
        """Take the columns of a processor as a further dataset.

        Raises:
            ValueError: columns that are missing, of several lengths, or that do not fit together.
        """
        needed = ("input_ids", "labels", "prompt_lengths")
        if (
            not isinstance(columns, Mapping)
            or not {*needed} <= {*columns}
            or len({len(columns[key]) for key in needed}) != 1
        ):
            raise ValueError(f"dataset {name!r}: its processor gave {_said(columns)}; it must give {', '.join(needed)}")
        for ids, labels, length in zip(*(columns[key] for key in needed), strict=True):
            if list(labels) != [IGNORE_INDEX] * length + list(ids[length:]) or not 0 < length < len(ids):
                raise ValueError(
                    f"dataset {name!r}: its processor gave labels {list(labels)[:8]}… for a prompt of {length} tokens; "
                    "they must be -100 on it and input_ids after it"
                )
            self._rows.append((torch.tensor(ids, dtype=torch.int32), int(length)))
            self.file_ids.append(len(self.names))
        self.names.append(name)
        self.answers.append(answer)
        self.files += [file for file in files if file not in self.files]
        for key, what in (("prompt_cut", "prompts, from the left"), ("completion_cut", "completions")):
            if count := sum(columns.get(key, ())):
                self.notes.append((name, f"{count} of {len(columns[key])} {what}"))

    def split(self, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """(train, validation) indices: of each dataset a share is set apart, the same for the same seed and name."""
        parts: tuple[list[int], list[int]] = ([], [])
        for number, name in enumerate(self.names):
            own = [i for i, file_id in enumerate(self.file_ids) if file_id == number]
            held = min(len(own) - 1, max(1, round(val_fraction * len(own)))) if val_fraction > 0 else 0
            order = torch.randperm(len(own), generator=generator(seed, "split", name, len(own))).tolist()
            for part, chosen in zip(parts, (order[held:], order[:held]), strict=True):
                part.extend(own[i] for i in sorted(chosen))
        return parts


def _said(columns: Any) -> str:
    if not isinstance(columns, Mapping):
        return f"a {type(columns).__name__}"
    return ", ".join(f"{name} [{len(column)}]" for name, column in columns.items()) or "nothing"


class DatasetCreator:
    """Makes `TaskDataset`s, by processors of names.

    Args:
        tokenizer: of transformers.
        max_length: as for `DatasetProcessor`.
    """

    def __init__(self, tokenizer: Any, max_length: int = MAX_LENGTH):
        self.tokenizer, self.max_length = tokenizer, max_length
        self._processors = registered()

    def register_processor(self, name: str, processor: Any) -> None:
        """`register_processor`, for this creator alone."""
        self._processors[name] = processor

    def processor(self, name: str, place: str = "") -> DatasetProcessor:
        """The processor of a name.

        Raises:
            ValueError: there is none; `place` begins the message.
        """
        if name not in self._processors:
            where = f"{place}: " if place else ""
            raise ValueError(f"{where}name is {name!r}; it must be a processor: {', '.join(self._processors)}")
        found = self._processors[name]
        return found if isinstance(found, DatasetProcessor) else found(self.tokenizer, self.max_length)

    def create_dataset(self, config: Configs) -> TaskDataset:
        """`create_dataset`."""
        dataset, configs = TaskDataset(), _configs(config)
        # names before files: a wrong one is said at once
        processors = [self.processor(c.name, c.place) for c in configs]
        for c, processor, name in zip(configs, processors, display_names(configs), strict=True):
            records = read_records(c)
            dataset.add(name, _process(processor, records), records.files, processor.answer)
        return dataset


def create_dataset(config: Configs, tokenizer: Any, max_length: int = MAX_LENGTH) -> TaskDataset:
    """The examples of all datasets of a configuration.

    Args:
        config: the path of a JSON file, or its entries.
        tokenizer: of transformers, with an end-of-text token.
        max_length: the most tokens of an example.

    Raises:
        MissingExtraError: a dataset of the hub, and `datasets` is not installed.
        OSError, ValueError: a configuration, file or record that does not fit; the message names its place.
    """
    return DatasetCreator(tokenizer, max_length).create_dataset(config)


def _configs(config: Configs) -> list[DatasetConfig]:
    if isinstance(config, (str, Path)):
        return read_configs(config)
    found = [
        c if isinstance(c, DatasetConfig) else DatasetConfig.of(dict(c), f"entry {i}") for i, c in enumerate(config, 1)
    ]
    if not found:
        raise ValueError("config is empty; it must have at least one dataset")
    return found


def _process(processor: DatasetProcessor, records: Records) -> Columns:
    """The columns of all records; an error names the first record that the processor does not take."""
    try:
        return processor.process(records.rows)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        for row, place in zip(records.rows, records.places, strict=True):
            try:
                processor.process([row])
            except EmptyTextError as found:
                raise ValueError(f"{place}: {found}") from found
            except (LookupError, TypeError, ValueError, AttributeError) as found:
                reason = f"it has no {found}" if isinstance(found, KeyError) else one_line(found)
                raise ValueError(f"{place}: {reason}") from found
        # it takes each record alone
        raise ValueError(f"{type(processor).__name__}.process: {one_line(error)}") from error


class Collator:
    """Items of a `TaskDataset` to batches.

    Args:
        pad_id: fills `input_ids`.
        side: "right" for training; "left" keeps the prompts alone, for generation.

    Returns (from a call):
        `{"input_ids": [B, S] int64, "attention_mask": [B, S] int64, "labels": [B, S] int64 (right alone),
        "prompt_lengths": [B] int64, "file_id": [B] int64}`.

    Raises:
        ValueError: no items, or another side.
    """

    def __init__(self, pad_id: int, side: str = "right"):
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}; it must be right or left")
        self.pad_id, self.side = pad_id, side

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not items:
            raise ValueError("items is empty; it must have at least one item")
        rows = [
            item["input_ids"] if self.side == "right" else item["input_ids"][: item["prompt_length"]] for item in items
        ]
        batch = {
            "input_ids": self._padded([row.long() for row in rows], self.pad_id),
            "attention_mask": self._padded([torch.ones(len(row), dtype=torch.int64) for row in rows], 0),
        }
        if self.side == "right":
            batch["labels"] = self._padded([item["labels"].long() for item in items], IGNORE_INDEX)
        for key, name in (("prompt_lengths", "prompt_length"), ("file_id", "file_id")):
            batch[key] = torch.tensor([item[name] for item in items])
        return batch

    def _padded(self, rows: Sequence[Tensor], value: int) -> Tensor:
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(list(rows), batch_first=True, padding_value=value, padding_side=self.side)

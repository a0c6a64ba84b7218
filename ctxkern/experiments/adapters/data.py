"""The examples of adapters: a file or a folder for each."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.adapters.roster import Member
from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.paths import SUFFIXES, expand_paths
from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.data.windows import IGNORE_INDEX, Collator, EncodedDataset
from ctxkern.experiments.core.hub import HubTokenizer
from ctxkern.experiments.core.names import printable
from ctxkern.experiments.core.seeding import derive_seed

SETTINGS = "adapters.json"
_KEYS = {"lr": (int, float), "steps": int}


def discover(folder: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """{name: (path, settings)} of the adapters of a folder: its files of a known kind, and its folders.

    `adapters.json` there may give some of them a learning rate and a number of steps: {"name": {"lr": 1e-3, "steps":
    300}}.

    Raises:
        ValueError: no folder, none in it, two of one name, or settings of another form.
    """
    if not folder:
        raise ValueError("data is ''; it must be a folder with a file or a folder for each adapter")
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"data is {printable(root)}, which is no folder; it must be one")
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name == SETTINGS or not (path.is_dir() or path.suffix.lower() in SUFFIXES):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise ValueError(f"data has {found[name].name} and {path.name}; two adapters must not share a name")
        found[name] = path.absolute()
    if not found:
        raise ValueError(
            f"data is {printable(root)}; it must hold files of a known kind ({' '.join(SUFFIXES)}) or folders"
        )
    given = _settings(root / SETTINGS)
    for name in given:
        if name not in found:
            raise ValueError(f"{SETTINGS} names {name!r}; it must name adapters of the folder: {', '.join(found)}")
    return {name: (path, given.get(name, {})) for name, path in found.items()}


def _settings(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{printable(path)} is no JSON: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
        raise ValueError(f'{printable(path)} must be an object of objects, as {{"name": {{"lr": 0.001}}}}')
    for name, values in given.items():
        for key, value in values.items():
            known = key in _KEYS and isinstance(value, _KEYS[key]) and not isinstance(value, bool)
            if not known or not 0 < value < math.inf:
                raise ValueError(
                    f"{printable(path)}: {name} has {key} {value!r}; it must be lr or steps, above 0 and finite"
                )
    return given


class AdapterData:
    """The examples of one adapter, as batches of `rows` by its own count of steps.

    Args:
        member: which adapter.
        tokenizer, seq_len, val_fraction, rows, seed: as the settings of the run have them.

    Attributes:
        files: SHA-256 of its files by path.

    Raises:
        BadFilesError: files that cannot be read. ValueError: they leave nothing to train on.
    """

    def __init__(
        self, member: Member, tokenizer: HubTokenizer, *, seq_len: int, val_fraction: float, rows: int, seed: int
    ):
        own = derive_seed(seed, "adapter", member.name)
        dataset = MultiFileDataset(expand_paths([member.path]), val_fraction=val_fraction, seed=own)
        self.files = {str(path): sum_ for path, sum_ in zip(dataset.file_paths, dataset.checksums, strict=True)}
        self.train, self.validation = (
            EncodedDataset(dataset, tokenizer, seq_len, split=split) for split in ("train", "validation")
        )
        if not len(self.train):
            raise ValueError(f"adapter {member.name!r}: {printable(member.path)} leaves nothing to train on")
        rows = min(rows, len(self.train))
        self.sampler = MixedFileBatchSampler([0] * len(self.train), rows, seed=own, drop_last=True)

    def rows_at(self, step: int) -> list[dict]:
        """The examples of its step."""
        return [self.train[i] for i in self.sampler.batch_at(step)]


def collate(collator: Collator, items: Sequence[Mapping], slots: Sequence[int]) -> Batch:
    """A batch of examples of several adapters.

    `weight` [B] is such that the sum of the rows' losses by their weights is the mean over adapters of the mean over
    labels.
    """
    batch = {name: t for name, t in collator(items).items() if name != "file_id"}
    adapter = torch.tensor(slots)
    labels = (batch["target"] != IGNORE_INDEX).sum(1)
    of_adapter = torch.zeros(max(slots) + 1, dtype=torch.int64).index_add_(0, adapter, labels)
    batch["adapter"], batch["weight"] = adapter, 1 / (of_adapter[adapter] * len(set(slots))).double()
    return batch

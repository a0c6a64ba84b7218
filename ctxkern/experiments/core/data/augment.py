"""More ARC tasks from those that there are: turned, mirrored, recoloured, each variant as a file of its own."""

import copy
from collections.abc import Callable

import torch

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.records import grid_to_text, text_to_grid
from ctxkern.experiments.core.seeding import generator

Grid = list[list[int]]


def _symmetry(number: int) -> Callable[[Grid], Grid]:
    """One of the eight of a square: 0 leaves a grid as it is."""

    def apply(grid: Grid) -> Grid:
        for _ in range(number % 4):
            grid = [list(row) for row in zip(*grid[::-1], strict=True)]
        return [row[::-1] for row in grid] if number >= 4 else grid

    return apply


def _variant(*seed: int | str) -> Callable[[str], str]:
    """A symmetry and a permutation of the colours 1 to 9, for the text of a grid; 0, the background, stays."""
    rng = generator(*seed)
    symmetry = _symmetry(int(torch.randint(8, (), generator=rng)))
    colours = [0, *(torch.randperm(9, generator=rng) + 1).tolist()]
    return lambda text: grid_to_text([[colours[cell] for cell in row] for row in symmetry(text_to_grid(text))])


def _is_grid(text: str) -> bool:
    try:
        rows = text_to_grid(text)
    except ValueError:
        return False
    return bool(rows[0]) and all(len(row) == len(rows[0]) for row in rows)


def augmented(dataset: MultiFileDataset, variants: int, seed: int) -> MultiFileDataset:
    """`dataset` with so many variants of each file whose examples are all pairs of grids.

    A variant is one more file, "NAME#1" and so on, with a context to itself, as which colour is which is part of the
    task. It has the training examples alone; validation is that of the files themselves. A seed has its variants.
    """
    by_file: dict[int, list[int]] = {}
    for i, file_id in enumerate(dataset.file_ids):
        by_file.setdefault(file_id, []).append(i)
    grids = [
        file_id
        for file_id, items in by_file.items()
        if all(_is_grid(dataset.data[i][key]) for i in items for key in ("input", "target"))
    ]
    more = copy.copy(dataset)
    more.data, more.file_ids, more.splits = list(dataset.data), list(dataset.file_ids), list(dataset.splits)
    more.file_names = list(dataset.file_names)
    for number in range(1, variants + 1):
        for file_id in grids:
            name = f"{dataset.file_names[file_id]}#{number}"
            change = _variant(seed, "variant", name)
            for i in by_file[file_id]:
                if dataset.splits[i] == "train":
                    item = dataset.data[i]
                    more.data.append({key: change(item[key]) for key in ("input", "target")})
                    more.file_ids.append(len(more.file_names))
                    more.splits.append("train")
            more.file_names.append(name)
    return more

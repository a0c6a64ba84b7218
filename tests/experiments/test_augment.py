"""Variants of ARC tasks: turned and recoloured pairs, each variant a file, validation untouched."""

import json

import pytest
from helpers.runs import tiny, write

from ctxkern.experiments.core.data.augment import _symmetry, augmented
from ctxkern.experiments.core.data.records import text_to_grid
from ctxkern.experiments.multifile.data import MultiFileDataset
from ctxkern.experiments.multifile.train import prepare


@pytest.fixture
def task(tmp_path):
    """A task whose output is its input mirrored."""
    inputs = [[[0, 1, 2], [3, 4, 5]], [[5, 0, 0], [0, 0, 7]], [[1, 1, 9], [0, 2, 8]], [[4, 0, 6], [6, 3, 3]]]
    pairs = [{"input": grid, "output": [row[::-1] for row in grid]} for grid in inputs]
    return write(tmp_path, "task.json", json.dumps({"train": pairs[:3], "test": pairs[3:]}))


def test_the_eight_symmetries_are_a_group_of_different_ones():
    grid = [[1, 2, 3], [4, 5, 6]]
    images = [_symmetry(number)(grid) for number in range(8)]
    assert len({json.dumps(image) for image in images}) == 8
    assert images[0] == grid
    turned = grid
    for _ in range(4):
        turned = _symmetry(1)(turned)
    assert turned == grid
    assert _symmetry(4)(_symmetry(4)(grid)) == grid


def test_a_variant_changes_both_sides_alike(task, tmp_path):
    text = write(tmp_path, "words.jsonl", '{"input": "a", "target": "b"}\n' * 4)
    dataset = MultiFileDataset([task, text], val_fraction=0.25)
    more = augmented(dataset, 5, seed=0)
    assert more.file_names == ["task.json", "words.jsonl", *(f"task.json#{i}" for i in range(1, 6))]
    assert more.num_files == 7
    assert dataset.num_files == 2
    assert more.data[: len(dataset)] == dataset.data
    assert augmented(dataset, 5, seed=0).data == more.data != augmented(dataset, 5, seed=1).data
    originals = [dataset.data[i] for i in range(len(dataset)) if dataset.file_ids[i] == 0][:3]
    for file_id in range(2, 7):
        items = [item for item, i in zip(more.data, more.file_ids, strict=True) if i == file_id]
        assert len(items) == 3
        maps = {}
        for item, original in zip(items, originals, strict=True):
            grids = [text_to_grid(item[key]) for key in ("input", "target")]
            # still mirrored: left to right, or top to bottom where it was turned
            assert grids[1] in ([row[::-1] for row in grids[0]], grids[0][::-1])
            cells = [sorted(map(int, side["input"].replace("\n", ""))) for side in (item, original)]
            assert cells[0].count(0) == cells[1].count(0)
            maps.setdefault(len(set(cells[1])), len(set(cells[0])))
        assert all(before == after for before, after in maps.items())
    assert {split for split, i in zip(more.splits, more.file_ids, strict=True) if i >= 2} == {"train"}


def test_a_run_has_contexts_for_variants_and_validates_on_the_files(task):
    job = prepare(tiny(augment=3, seq_len=32), [task])
    assert job.model.config.num_files == 4
    assert len(job.train_data) == 12
    assert list(job.evaluator()(job.model)) == ["task.json"]

import json

import pytest
import torch
from helpers.runs import write
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler
from ctxkern.experiments.core.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
)
from ctxkern.experiments.multifile.data import Collator, EncodedDataset, MultiFileDataset


def make_files(folder, counts):
    """Files of examples that name their file and position."""

    def lines(i, n):
        return "".join(json.dumps({"input": f"{i}:{j}", "target": f"t{i}"}) + "\n" for j in range(n))

    return [write(folder, f"f{i}.jsonl", lines(i, n)) for i, n in enumerate(counts)]


def test_items_have_the_three_keys_and_ids_are_positions(tmp_path):
    dataset = MultiFileDataset(make_files(tmp_path, [3, 1, 4]))
    assert dataset[3] == {"input": "1:0", "target": "t1", "file_id": 1}
    assert dataset.file_ids == [0] * 3 + [1] + [2] * 4
    assert dataset.num_files == 3
    assert dataset.file_names == ["f0.jsonl", "f1.jsonl", "f2.jsonl"]


def test_names_take_folders_where_files_share_one(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "a.txt", "some text")
    paths = [tmp_path / "x/a.txt", tmp_path / "y/a.txt"]
    assert MultiFileDataset(paths).file_names == ["x/a.txt", "y/a.txt"]
    assert MultiFileDataset([*paths, paths[0]]).file_names == ["x/a.txt (0)", "y/a.txt", "x/a.txt (2)"]


def test_split_is_seeded_tail_or_nothing(tmp_path):
    paths = [*make_files(tmp_path, [40, 1]), write(tmp_path, "t.txt", "x" * 5000)]
    dataset = MultiFileDataset(paths, val_fraction=0.2, chunk_chars=100)
    by_file = {i: [s for s, f in zip(dataset.splits, dataset.file_ids, strict=True) if f == i] for i in range(3)}
    assert by_file[0].count("validation") == 8
    assert by_file[1] == ["train"]
    assert by_file[2] == ["train"] * 40 + ["validation"] * 10
    assert dataset.splits == MultiFileDataset(paths, val_fraction=0.2, chunk_chars=100).splits
    assert dataset.splits != MultiFileDataset(paths, val_fraction=0.2, chunk_chars=100, seed=1).splits
    assert set(MultiFileDataset(paths[:2], val_fraction=0).splits) == {"train"}


def check_ids(batch, tokenizer):
    for row, file_id in zip(batch["input"], batch["file_id"].tolist(), strict=True):
        assert tokenizer.decode(row).startswith(f"{file_id}:")


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_survive_shuffling_workers_drop_last_and_subset(tmp_path, workers):
    dataset = MultiFileDataset(make_files(tmp_path, [13, 5, 9]))
    tokenizer = CharTokenizer.from_texts(dataset.texts())
    subset = Subset(dataset, list(range(1, len(dataset))))
    loader = DataLoader(
        subset, batch_size=4, shuffle=True, drop_last=True, num_workers=workers, collate_fn=Collator(tokenizer, 16)
    )
    batches = list(loader)
    assert len(batches) == 6
    for batch in batches:
        assert batch["file_id"].dtype == torch.int64
        check_ids(batch, tokenizer)


def test_ids_survive_the_mixed_sampler_with_workers(tmp_path):
    dataset = MultiFileDataset(make_files(tmp_path, [13, 5, 9]), val_fraction=0)
    tokenizer = CharTokenizer.from_texts(dataset.texts())
    data = EncodedDataset(dataset, tokenizer, 16, loss="all")
    sampler = MixedFileBatchSampler(data.file_ids, 4, drop_last=True)
    for batch in DataLoader(data, batch_sampler=sampler, num_workers=2, collate_fn=Collator(tokenizer, 16)):
        assert len(batch["file_id"].unique()) >= 2
        check_ids(batch, tokenizer)


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@given(sizes, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3))
@example([30, 1], 3, False, False, 0)
@example([30, 1], 3, True, False, 0)
@example([2, 1], 2, False, False, 0)
@example([30, 1, 1], 8, True, True, 0)
def test_sampler_mixes_files_and_loses_nothing(counts, batch_size, drop_last, balanced, epoch):
    ids = [i for i, n in enumerate(counts) for _ in range(n)]
    if drop_last and len(ids) < batch_size:
        with pytest.raises(ValueError, match="drop_last"):
            MixedFileBatchSampler(ids, batch_size, drop_last=True)
        return
    sampler = MixedFileBatchSampler(ids, batch_size, seed=1, drop_last=drop_last, balanced=balanced)
    batches = sampler.batches(epoch)
    assert len(batches) == len(sampler)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        if drop_last:
            assert len(batch) == batch_size
        if len(counts) > 1 and batch_size > 1:
            assert len({ids[i] for i in batch}) >= 2
    seen = [i for batch in batches for i in batch]
    if not drop_last and not balanced:
        assert set(seen) == set(range(len(ids)))
    if not balanced and max(counts) * 2 <= len(ids) and batch_size > 2 and drop_last:
        assert len(seen) == len(set(seen))


def test_sampler_is_a_function_of_seed_epoch_and_position():
    ids = [0] * 20 + [1] * 30 + [2] * 7
    sampler = MixedFileBatchSampler(ids, 4, seed=3, drop_last=True)
    whole = [batch for epoch in range(3) for batch in sampler.batches(epoch)]
    assert [sampler.batch_at(step) for step in range(len(whole))] == whole
    fresh = MixedFileBatchSampler(ids, 4, seed=3, drop_last=True)
    fresh.set_epoch(1, 5)
    assert list(fresh) == sampler.batches(1)[5:]
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.batches(0) != MixedFileBatchSampler(ids, 4, seed=4, drop_last=True).batches(0)


def test_balanced_sampler_gives_files_equal_shares():
    ids = [0] * 100 + [1] * 10 + [2] * 10
    sampler = MixedFileBatchSampler(ids, 6, balanced=True, drop_last=True)
    drawn = [ids[i] for batch in sampler.batches(0) for i in batch]
    assert [drawn.count(i) for i in range(3)] == [40, 40, 40]


def encoded(tmp_path, prompt, target, seq_len, loss):
    path = write(tmp_path, "one.json", json.dumps([{"input": prompt, "target": target}]))
    dataset = MultiFileDataset([path])
    tokenizer = ByteTokenizer()
    return tokenizer, EncodedDataset(dataset, tokenizer, seq_len, loss=loss)


@pytest.mark.parametrize("loss", ["target", "all"])
@pytest.mark.parametrize("seq_len", [1, 4, 7, 8, 9, 100])
def test_windows_hold_every_label_once(tmp_path, seq_len, loss):
    tokenizer, data = encoded(tmp_path, "abcde", "xyz", seq_len, loss)
    sequence = [*b"abcde", tokenizer.sep_id, *b"xyz", tokenizer.eos_id]
    labels = []
    for item in data:
        known = item["target"] != -100
        assert known.any()
        assert len(item["input"]) <= seq_len
        labels += item["target"][known].tolist()
        # every label follows its input in the sequence
        for token, label in zip(item["input"].tolist(), item["target"].tolist(), strict=True):
            assert label in (-100, sequence[sequence.index(token) + 1])
    assert labels == (sequence[6:] if loss == "target" else sequence[1:])
    assert data.num_labels == len(labels)


@pytest.mark.parametrize("seq_len", [4, 7, 8, 9, 20])
def test_where_an_answer_starts_does_not_tell_its_length(tmp_path, seq_len):
    """Not in a window of the data set, nor in one that the collator cuts."""
    targets = ["y", "no", "perhaps so"]
    items = [{"input": "p" * 30, "target": target} for target in targets]
    path = write(tmp_path, "one.json", json.dumps(items))
    dataset, tokenizer = MultiFileDataset([path]), ByteTokenizer()
    starts, first = [], EncodedDataset(dataset, tokenizer, seq_len)
    for target in targets:
        item = next(i for i in first if tokenizer.encode(target)[0] in i["target"].tolist())
        starts.append(item["input"].tolist().index(tokenizer.sep_id))
    assert len(set(starts)) == 1
    batch = Collator(tokenizer, seq_len)([{**item, "file_id": 0} for item in items])
    assert len({row.index(tokenizer.sep_id) for row in batch["input"].tolist()}) == 1


def test_windows_without_labels_are_dropped(tmp_path):
    _, data = encoded(tmp_path, "p" * 100, "t", 10, "target")
    assert len(data) == 1
    _, data = encoded(tmp_path, "p" * 100, "t", 10, "all")
    assert len(data) == 11


def test_text_labels_all_its_tokens_and_ends_once(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(997))
    dataset = MultiFileDataset([write(tmp_path, "a.txt", text)], chunk_chars=100)
    tokenizer = ByteTokenizer()
    collate = Collator(tokenizer, 50)
    data = EncodedDataset(dataset, tokenizer, 50)
    batch = collate(list(data))
    assert torch.equal(batch["target"] == -100, batch["padding_mask"])
    labels = batch["target"][batch["target"] != -100]
    assert (labels == tokenizer.eos_id).sum() == 1
    assert len(labels) == len(text) + 1


def test_collator_pads_and_masks():
    tokenizer = ByteTokenizer()
    items = [{"input": "ab", "target": "c", "file_id": 3}, {"input": "abcdefgh", "target": "xy", "file_id": 1}]
    batch = Collator(tokenizer, 6)(items)
    pad, sep, eos = tokenizer.pad_id, tokenizer.sep_id, tokenizer.eos_id
    assert batch["input"].tolist() == [[97, 98, sep, 99, pad, pad], [*b"fgh", sep, *b"xy"]]
    assert batch["target"].tolist() == [[-100, -100, 99, eos, -100, -100], [-100, -100, -100, 120, 121, eos]]
    assert batch["padding_mask"].tolist() == [[False] * 4 + [True] * 2, [False] * 6]
    assert batch["file_id"].tolist() == [3, 1]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input": torch.int64, "target": torch.int64, "file_id": torch.int64, "padding_mask": torch.bool,
    }  # fmt: skip
    everything = Collator(tokenizer, 6, loss="all")(items)
    assert everything["target"].tolist()[0] == [98, sep, 99, eos, -100, -100]


def test_bad_arguments_are_named(tmp_path):
    tokenizer = ByteTokenizer()
    dataset = MultiFileDataset(make_files(tmp_path, [2]))
    with pytest.raises(ValueError, match="loss is 'some'; it must be one of"):
        Collator(tokenizer, 4, loss="some")
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        EncodedDataset(dataset, tokenizer, 0)
    with pytest.raises(ValueError, match="val_fraction is 1; it must be at least 0 and below 1"):
        MultiFileDataset(make_files(tmp_path, [2]), val_fraction=1)
    with pytest.raises(ValueError, match="split is 'test'; it must be one of"):
        dataset.indices("test")
    with pytest.raises(ValueError, match="an item has 5 tokens; it must have at most seq_len = 4"):
        Collator(tokenizer, 4)([{"input": torch.zeros(5), "target": torch.zeros(5), "file_id": 0}])
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        MixedFileBatchSampler([0], 0)
    with pytest.raises(ValueError, match="start_batch"):
        MixedFileBatchSampler([0, 1], 2).set_epoch(0, 2)

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from ctxkern.experiments.core.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)
from ctxkern.experiments.multifile.data import Collator, EncodedDataset, MultiFileDataset, load_file
from ctxkern.experiments.multifile.files import grid_to_text, text_to_grid
from ctxkern.experiments.multifile.paths import expand_paths, standard_library_files
from ctxkern.experiments.multifile.sampler import MixedFileBatchSampler

DATA = Path(__file__).parents[3] / "shared" / "data"
ARC = {
    "train": [{"input": [[1, 0], [0, 2]], "output": [[2]]}, {"input": [[3]], "output": [[4, 5]]}],
    "test": [{"input": [[7]], "output": [[8, 9]]}, {"input": [[6]]}],
}


def write(folder, name, value):
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else value.encode())
    return path


def pairs(items):
    return [(item["input"], item["target"]) for item in items]


def make_files(folder, counts):
    """Files of examples that name their file and position."""

    def lines(i, n):
        return "".join(json.dumps({"input": f"{i}:{j}", "target": f"t{i}"}) + "\n" for j in range(n))

    return [write(folder, f"f{i}.jsonl", lines(i, n)) for i, n in enumerate(counts)]


RECORDS = {
    "input-target": ({"input": "a", "target": "b"}, ("a", "b")),
    "input-output": ({"input": "a", "output": "b"}, ("a", "b")),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, ("a", "b")),
    "question-answer": ({"question": "a", "answer": 3}, ("a", "3")),
    "capitals": ({"Body": "x", "Question": "a", "Answer": 51.0, "ID": "1"}, ("x\na", "51.0")),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, ("a\ni", "b")),
    "alpaca-empty": ({"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
    "text": ({"text": "t", "id": 1}, ("", "t")),
    "answers": ({"question": "a", "answer": ["b"]}, ("a", "b")),
    "grids": ({"input": [[1, 2]], "output": [[3], [4]]}, ("12", "3\n4")),
    "crlf": ({"input": "a\r\nb", "target": "c"}, ("a\nb", "c")),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        ("user: q", "r"),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_by_line_in_lists_and_under_examples(tmp_path, name):
    record, expected = RECORDS[name]
    lines = json.dumps(record) + "\n\n" + json.dumps(record)
    assert pairs(load_file(write(tmp_path, "a.jsonl", lines))) == [expected] * 2
    assert pairs(load_file(write(tmp_path, "a.json", json.dumps([record])))) == [expected]
    assert pairs(load_file(write(tmp_path, "b.json", json.dumps({"canary": "x", "examples": [record]})))) == [expected]


def test_arc_grids_are_rows_of_digits_and_test_pairs_validation(tmp_path):
    items = load_file(write(tmp_path, "arc.json", json.dumps(ARC)))
    assert pairs(items) == [("10\n02", "2"), ("3", "45"), ("7", "89")]
    dataset = MultiFileDataset([tmp_path / "arc.json"])
    assert dataset.splits == ["train", "train", "validation"]
    assert text_to_grid(grid_to_text([[1, 0], [0, 2]])) == [[1, 0], [0, 2]]


def test_text_is_cut_in_contiguous_chunks(tmp_path):
    text = "äb\r\nc" * 500
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbf" + text.encode())
    items = load_file(path, chunk_chars=100)
    assert "".join(item["target"] for item in items) == text.replace("\r\n", "\n")
    assert {item["input"] for item in items} == {""}
    assert [item["continues"] for item in items] == [True] * (len(items) - 1) + [False]
    assert max(len(item["target"]) for item in items) == 100
    assert len(load_file(write(tmp_path, "short.md", "0123456789" * 2))) == 10


BAD_FILES = {
    "latin1": ("a.txt", "café".encode("latin-1"), "not UTF-8 text .*0xe9 at offset 3"),
    "json": ("a.json", b"{'a': 1}", "not JSON"),
    "jsonl": ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2: not JSON"),
    "keys": ("a.jsonl", b'{"text": "x"}\n{"foo": "x"}\n', r"record 2: got \['foo'\], takes the keys input/target"),
    "object": ("a.json", b'{"foo": 1}', r"the keys \['foo'\]"),
    "number": ("a.json", b"3", "JSON of type int"),
    "arc": ("a.json", json.dumps({"train": [{"input": [[1]], "output": [[11]]}], "test": []}).encode(), r"train\[0\]"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    file_name, content, message = BAD_FILES[name]
    path = write(tmp_path, file_name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_file(path)
    assert str(path) in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "absent.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_file(tmp_path)
    with pytest.raises(ValueError, match=r"empty\.txt has no examples"):
        MultiFileDataset([write(tmp_path, "empty.txt", "")])
    with pytest.raises(ValueError, match="got no path"):
        MultiFileDataset([])
    with pytest.raises(TypeError, match="sequence of paths"):
        MultiFileDataset("a.txt")


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


@given(st.text(), st.text())
def test_tokenizers_round_trip(text, other):
    tokenizer = CharTokenizer.from_texts([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.pad_id, tokenizer.sep_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert all(len(CharTokenizer.specials) <= i < tokenizer.vocab_size for i in ids)
    expected = "".join(c if c in text else "\ufffd" for c in other)
    assert tokenizer.decode(tokenizer.encode(other)) == expected
    byte = ByteTokenizer()
    assert byte.decode([*byte.encode(text), byte.eos_id]) == text
    assert tokenizer_from_json(byte.to_json()) == byte


def test_tokenizer_file_and_errors(tmp_path):
    tokenizer = CharTokenizer("aé\n\u2028")
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json") == tokenizer
    for text in ("{", "[]", '{"type": "words"}', '{"type": "chars"}'):
        with pytest.raises(ValueError, match="tokenizer"):
            tokenizer_from_json(text)
    with pytest.raises(ValueError, match="got 8"):
        tokenizer.decode([8])
    with pytest.raises(TypeError, match="'ab'"):
        CharTokenizer(["ab"])


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
    with pytest.raises(ValueError, match="loss: got 'some'"):
        Collator(tokenizer, 4, loss="some")
    with pytest.raises(ValueError, match="seq_len: got 0"):
        EncodedDataset(dataset, tokenizer, 0)
    with pytest.raises(ValueError, match="val_fraction: got 1"):
        MultiFileDataset(make_files(tmp_path, [2]), val_fraction=1)
    with pytest.raises(ValueError, match="split: got 'test'"):
        dataset.indices("test")
    with pytest.raises(ValueError, match="items: got one of 5 tokens"):
        Collator(tokenizer, 4)([{"input": torch.zeros(5), "target": torch.zeros(5), "file_id": 0}])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        MixedFileBatchSampler([0], 0)
    with pytest.raises(ValueError, match="start_batch"):
        MixedFileBatchSampler([0, 1], 2).set_epoch(0, 2)


def test_paths_folders_and_patterns(tmp_path):
    for name in ("b/x.txt", "b/c/y.jsonl", "a.md", "b/image.png", "b/.hidden.txt", "b/__pycache__/z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, "some text")
    write(tmp_path, "b/empty.txt", "")
    found = expand_paths([tmp_path / "b", tmp_path / "a.md", tmp_path / "b/x.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b/c/y.jsonl", "b/x.txt", "a.md"]
    assert expand_paths([str(tmp_path / "**" / "*.jsonl")]) == [tmp_path / "b/c/y.jsonl"]
    for bad in ("nothing.txt", "*.nothing"):
        with pytest.raises(ValueError, match=r"nothing"):
            expand_paths([tmp_path / bad])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no file of a known kind"):
        expand_paths([tmp_path / "none"])


def test_the_standard_library_is_at_hand():
    files = standard_library_files()
    assert len(files) == 16
    assert files == standard_library_files()
    assert MultiFileDataset(files).num_files == 16


@pytest.mark.skipif(not DATA.exists(), reason="the real data of ../shared/data is not here")
def test_real_files_load():
    bbh = sorted((DATA / "bbh/bbh").glob("*.json"))
    arc = sorted((DATA / "arc_agi_1/data/training").glob("*.json"))[:50]
    others = [DATA / "gsm8k/test.jsonl", DATA / "svamp/SVAMP.json", DATA / "tinyshakespeare/input.txt"]
    dataset = MultiFileDataset([*bbh, *arc, *others])
    assert dataset.num_files == 27 + 50 + 3
    assert all(item["target"] for item in dataset.data)
    first_arc = dataset.file_ids.index(len(bbh))
    task = json.loads(arc[0].read_text())
    assert text_to_grid(dataset[first_arc]["input"]) == task["train"][0]["input"]

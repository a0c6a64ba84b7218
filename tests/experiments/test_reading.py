import codecs
import hashlib
import json

import pytest
from helpers.runs import DATA, write

from ctxkern.experiments.core.data.dataset import MultiFileDataset
from ctxkern.experiments.core.data.reading import BadFilesError, load_file, read_file, read_files
from ctxkern.experiments.core.data.records import grid_to_text, text_to_grid

ARC = {
    "train": [{"input": [[1, 0], [0, 2]], "output": [[2]]}, {"input": [[3]], "output": [[4, 5]]}],
    "test": [{"input": [[7]], "output": [[8, 9]]}, {"input": [[6]]}],
}


def pairs(items):
    return [(item["input"], item["target"]) for item in items]


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
    "definition": ({"definition": ["d"], "input": "a", "output": ["b"]}, ("d\na", "b")),
    "instruction": ({"instruction": "do", "input": "a", "target": "b"}, ("do\na", "b")),
    "system": ({"system": "be brief", "question": "a", "answer": "b"}, ("be brief\na", "b")),
    "passage": ({"context": "p", "instruction": "do", "question": "a", "answer": "b"}, ("do\np\na", "b")),
    "choices": ({"question": "a", "choices": ["x", "y"], "answer": "B"}, ("a\nA. x\nB. y", "B")),
    "choices-by-number": ({"question": "a", "choices": ["x", "y"], "answer": 1}, ("a\n0. x\n1. y", "1")),
    "choices-labelled": (
        {"question": "a", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        ("a\n1. x\n2. y", "2"),
    ),
    "choices-objects": (
        {"question": "a", "choices": [{"text": "x", "label": "P"}, {"text": "y", "label": "Q"}], "answer": "Q"},
        ("a\nP. x\nQ. y", "Q"),
    ),
    "options": ({"question": "a", "options": {"A": "x", "B": "y"}, "answer": "B"}, ("a\nA. x\nB. y", "B")),
    "empty-fields": ({"system": "", "context": "", "instruction": "a", "response": "b"}, ("a", "b")),
    "instruction-text": ({"instruction": "say", "text": "t"}, ("say", "t")),
    "messages-parts": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "s"}]},
                {"role": "user", "content": [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "r"}]},
            ]
        },
        ("system: s\nuser: q1 q2", "r"),
    ),
    "messages-null": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": None},
                {"role": "assistant", "content": "r"},
            ]
        },
        ('user: q\nassistant: {"name": "f"}\ntool: ', "r"),
    ),
    "messages-call": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}, {"name": "g"}]},
            ]
        },
        ("user: q", '[{"name": "f"}, {"name": "g"}]'),
    ),
    "messages-system": (
        {
            "system": "s",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
        },
        ("s\nuser: q", "r"),
    ),
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


def notes_of(folder, name, value):
    return read_file(write(folder, name, json.dumps(value))).notes


def test_what_is_not_used_is_noted(tmp_path):
    records = [{"question": "a", "answer": "b", "id": 1, "Level": "2"}, {"text": "t", "url": "u", "none": None}]
    assert notes_of(tmp_path, "a.json", records) == ["fields not used: id, level, url"]
    whole = {"canary": "c", "definition": "d", "examples": [{"input": "a", "target": "b", "rationale": "r"}]}
    assert notes_of(tmp_path, "a.json", whole) == ["fields not used: canary", "fields not used: rationale"]
    assert pairs(load_file(tmp_path / "a.json")) == [("d\na", "b")]
    messages = [{"role": "user", "content": "q", "name": "x"}, {"role": "assistant", "content": "r"}]
    assert notes_of(tmp_path, "a.json", [{"messages": messages}]) == ["fields not used: messages.name"]
    # everything here is in the prompt or the target
    record = {"system": "s", "context": "c", "question": "q", "choices": ["x"], "answer": "a"}
    assert notes_of(tmp_path, "a.json", [record]) == []


def test_collections_of_arc_tasks(tmp_path):
    held_back = {"train": ARC["train"], "test": [{"input": [[1]]}, {"input": [[2]], "output": None}]}
    by_name = read_file(write(tmp_path, "a.json", json.dumps({"one": ARC, "two": held_back})))
    assert pairs(by_name.items) == [("10\n02", "2"), ("3", "45"), ("7", "89"), ("10\n02", "2"), ("3", "45")]
    assert [item["split"] for item in by_name.items] == ["train", "train", "validation", "train", "train"]
    shared = "its 2 ARC tasks share one context; a file per task gives each its own"
    assert by_name.notes == ["3 test pairs without an output are left out", shared]
    listed = read_file(write(tmp_path, "b.json", json.dumps([ARC, held_back])))
    by_line = read_file(write(tmp_path, "c.jsonl", json.dumps(ARC) + "\n" + json.dumps(held_back)))
    assert listed.items == by_line.items == by_name.items
    without_test = read_file(write(tmp_path, "d.json", json.dumps({"train": ARC["train"]})))
    assert pairs(without_test.items) == [("10\n02", "2"), ("3", "45")]
    # none of them has validation: it trains, on the training pairs alone
    assert set(MultiFileDataset([write(tmp_path, "e.json", json.dumps(held_back))]).splits) == {"train"}


ENCODINGS = {
    "utf-8": (b"", "UTF-8"),
    "utf-8-mark": (codecs.BOM_UTF8, "UTF-8"),
    "utf-16-le": (b"", "UTF-16-LE"),
    "utf-16-be": (b"", "UTF-16-BE"),
    "utf-32-le": (b"", "UTF-32-LE"),
    "utf-32-be": (b"", "UTF-32-BE"),
    "utf-16-le-mark": (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    "utf-16-be-mark": (codecs.BOM_UTF16_BE, "UTF-16-BE"),
    "utf-32-le-mark": (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    "utf-32-be-mark": (codecs.BOM_UTF32_BE, "UTF-32-BE"),
}
TEXTS = {
    "english": "Once upon a time\nthere was a text.\n",
    "french": "Où est-elle ? Là-bas, près de l'hôtel.\n",
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему.\n",
    "chinese": "一个人在一生中会遇到一些问题。\n一,二,三。\n",
    "emoji": "fine 🙂 thanks\n",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unicode_with_and_without_a_byte_order_mark(tmp_path, encoding, text):
    mark, name = ENCODINGS[encoding]
    data = mark + TEXTS[text].encode(encoding.removesuffix("-mark"))
    content = read_file(write(tmp_path, "a.txt", data))
    assert "".join(item["target"] for item in content.items) == TEXTS[text]
    assert content.notes == ([] if name == "UTF-8" else [f"read as {name}"])
    assert content.sha256 == hashlib.sha256(data).hexdigest()
    line = json.dumps({"input": TEXTS[text], "target": "x"}, ensure_ascii=False)
    path = write(tmp_path, "a.jsonl", mark + line.encode(encoding.removesuffix("-mark")))
    assert pairs(load_file(path)) == [(TEXTS[text], "x")]


def test_all_bad_files_are_listed_or_skipped(tmp_path):
    good = [write(tmp_path, f"good{i}.txt", "some text") for i in range(3)]
    bad = [write(tmp_path, "bad.json", "{"), tmp_path / "absent.txt", write(tmp_path, "empty.txt", "")]
    mixed = [bad[0], good[0], bad[1], good[1], bad[2], good[2]]
    with pytest.raises(BadFilesError) as error:
        read_files(mixed)
    lines = str(error.value).split("\n")
    assert lines[0] == "3 files cannot be read (--skip-bad leaves them out):"
    assert lines[1].startswith(f"  {bad[0]}: line 1, column 2: not JSON: ")
    assert lines[2:] == [f"  {bad[1]}: No such file or directory", f"  {bad[2]}: it is empty"]
    contents, skipped = read_files(mixed, skip_bad=True)
    assert [content.path for content in contents] == good
    assert [file.path for file in skipped] == bad
    # the limit counts readable files
    contents, skipped = read_files(mixed, skip_bad=True, limit=2)
    assert [content.path for content in contents] == good[:2]
    assert [file.path for file in skipped] == bad[:2]
    with pytest.raises(BadFilesError, match="no file is left to train on:\n  .*bad.json"):
        read_files(bad, skip_bad=True)
    dataset = MultiFileDataset(mixed, skip_bad=True)
    assert dataset.file_paths == good
    assert dataset.skipped == skipped + [error.value.files[2]]
    assert dataset.file_ids[-1] == 2


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "absent.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_file(tmp_path)
    with pytest.raises(ValueError, match=r"empty\.txt: it is empty"):
        MultiFileDataset([write(tmp_path, "empty.txt", "")])
    with pytest.raises(ValueError, match="file_paths is empty"):
        MultiFileDataset([])
    with pytest.raises(TypeError, match="it must be a sequence of paths"):
        MultiFileDataset("a.txt")


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
    assert dataset.notes[-2] == ["fields not used: equation, id, type"]

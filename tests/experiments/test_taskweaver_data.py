"""The data of TaskWeaver: configurations, processors, examples, batches."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers  # noqa: E402
from helpers.language import save_model  # noqa: E402
from helpers.runs import DATA  # noqa: E402

from ctxkern.experiments.core.data.sampler import MixedFileBatchSampler  # noqa: E402
from ctxkern.experiments.core.extras import MissingExtraError  # noqa: E402
from ctxkern.experiments.taskweaver import data, processors  # noqa: E402
from ctxkern.experiments.taskweaver.configs import DatasetConfig, display_names, read_configs  # noqa: E402
from ctxkern.experiments.taskweaver.data import Collator, DatasetProcessor, create_dataset  # noqa: E402

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("model")))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(path, name="pairs", **more):
    return {"name": name, "dataset_path": str(path), **more}


def text(tokenizer, dataset, i):
    """(prompt, completion) of an example, specials included."""
    item = dataset[i]
    ids, length = item["input_ids"].long(), item["prompt_length"]
    assert item["labels"].tolist() == [-100] * length + ids[length:].tolist()
    return tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:])


RECORDS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "2.\n#### 2"}, "Question: 1 + 1?\nAnswer:", " 2.\n#### 2"),
    "svamp": (
        {"Body": "Jo has 3 dvds", "Question": "How many?", "Answer": 3.0, "Type": "Sum"},
        "Question: Jo has 3 dvds. How many?\nAnswer:",
        " 3",
    ),
    "bbh": ({"input": "Is it so?\n", "target": "No"}, "Is it so?\nAnswer:", " No"),
    "pairs": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2\n", "3"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_processors_that_are_built_in(name, tokenizer, tmp_path):
    record, prompt, completion = RECORDS[name]
    dataset = create_dataset([entry(jsonl(tmp_path / "x.jsonl", [record]), name)], tokenizer)
    assert text(tokenizer, dataset, 0) == (prompt, completion + "<eos>")
    assert dataset.names == [name]
    assert dataset.files == [tmp_path / "x.jsonl"]
    assert not dataset.notes


def test_a_processor_as_the_document_has_it(tokenizer, tmp_path, monkeypatch):
    class MyDatasetProcessor(DatasetProcessor):
        def process(self, examples):
            prompts = []
            completions = []
            for example in examples:
                prompts.append(example["input_field"])
                completions.append(example["output_field"])
            return self._prepare_examples(prompts, completions)

    rows = [{"input_field": "a b", "output_field": "c"}, {"input_field": "d", "output_field": "e"}]
    columns = MyDatasetProcessor(tokenizer).process(rows)
    assert columns["prompt_lengths"] == [3, 1]
    assert columns["attention_mask"] == [[1] * 5, [1] * 3]
    assert columns["labels"][1] == [-100, *columns["input_ids"][1][1:]]
    config = [entry(jsonl(tmp_path / "x.jsonl", rows), "my_dataset", num_samples=1)]
    monkeypatch.setattr(processors, "_BUILT_IN", dict(processors._BUILT_IN))
    with pytest.raises(ValueError, match=r"entry 1: name is 'my_dataset'; it must be a processor: gsm8k, svamp, bbh"):
        create_dataset(config, tokenizer)
    creator = data.DatasetCreator(tokenizer)
    creator.register_processor("my_dataset", MyDatasetProcessor(tokenizer))
    assert text(tokenizer, creator.create_dataset(config), 0) == ("a b", "c<eos>")
    data.register_processor("my_dataset", MyDatasetProcessor)
    assert len(create_dataset(config, tokenizer)) == 1
    with pytest.raises(TypeError, match="processor is a int; it must be a DatasetProcessor or a function"):
        data.register_processor("x", 3)
    jsonl(tmp_path / "x.jsonl", [rows[0], {"input_field": "a"}])
    with pytest.raises(ValueError, match=r"x\.jsonl: line 2: it has no 'output_field'"):
        create_dataset([config[0] | {"num_samples": None}], tokenizer)


def test_processors_that_break_the_contract(tokenizer, tmp_path):
    columns = {"input_ids": [[5, 6]], "labels": [[5, 6]], "prompt_lengths": [1]}
    for given, said in (
        ({}, "its processor gave nothing; it must give input_ids"),
        (3, "its processor gave a int"),
        ({**columns, "labels": []}, r"gave input_ids \[1\], labels \[0\]"),
        (columns, r"gave labels \[5, 6\]… for a prompt of 1 tokens; they must be -100 on it"),
    ):
        with pytest.raises(ValueError, match=said):
            data.TaskDataset().add("x", given)


def test_configurations_have_comments(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        '[ // all\n  {"name": "bbh", // its processor\n   "dataset_path": "a//b", "split": "train",\n'
        '   "num_samples": 10 // "few"\n  },\n  {"name": "x\\"//y", "dataset_path": "c", "dataset_config": null}\n]\n'
    )
    first, second = read_configs(path)
    assert (first.name, first.dataset_path, first.num_samples) == ("bbh", "a//b", 10)
    assert (second.name, second.dataset_config) == ('x"//y', None)
    assert first.place.endswith("c.json: line 2, entry 1")
    assert second.place.endswith("c.json: line 6, entry 2")


BAD = {
    '[{"name" "x"}]': r"c\.json: line 1, column 10: not JSON",
    "{}": "must hold a list of objects",
    "[]": "must hold a list of objects",
    "[\n3]": r"line 2, entry 1 is 3; it must be an object with name, dataset_path",
    '[\n\n{"name": "x"}]': "line 3, entry 1: dataset_path is missing; it must be a string that is not empty",
    '[{"name": 4, "dataset_path": "x"}]': "line 1, entry 1: name is 4",
    '[{"name": "x", "dataset_path": "x", "nun_samples": 3}]': "entry 1 has the key 'nun_samples'; it must have name",
    '[{"name": "x", "dataset_path": "x", "num_samples": 0}]': "num_samples is 0; it must be an integer of at least 1",
    '[{"name": "x", "dataset_path": "x", "split": ["a"]}]': r'split is \["a"\]; it must be a string, null',
}


@pytest.mark.parametrize("written", BAD)
def test_errors_of_configurations_name_the_place(written, tmp_path):
    (tmp_path / "c.json").write_text(written)
    with pytest.raises(ValueError, match=BAD[written]):
        read_configs(tmp_path / "c.json")


def test_datasets_of_one_processor_have_different_names():
    def named(*pairs):
        return display_names([DatasetConfig(name, path, inner) for name, path, inner in pairs])

    assert named(("a", "x", None), ("b", "x", None)) == ["a", "b"]
    assert named(("a", "p/x.json", None), ("a", "q", "y"), ("b", "x", None)) == ["a/x", "a/y", "b"]
    assert named(("a", "p/x.json", None), ("a", "q/x.json", None)) == ["a/p/x.json", "a/q/x.json"]
    assert named(("a", "x", None), ("a", "x", None)) == ["a/x (1)", "a/x (2)"]


def test_files_and_folders(tokenizer, tmp_path):
    def prompts(**more):
        dataset = create_dataset([entry(tmp_path, **more)], tokenizer)
        return [text(tokenizer, dataset, i)[0].strip() for i in range(len(dataset))]

    rows = [{"prompt": name, "completion": "y"} for name in "abcdef"]
    jsonl(tmp_path / "train.jsonl", rows[:2])
    (tmp_path / "test.json").write_text(json.dumps({"canary": "z", "examples": rows[2:4]}))
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "x.json").write_text(json.dumps({"data": rows[4:5]}))
    (inner / "y.json").write_text(json.dumps({"train": rows[4:5], "dev": rows[5:]}))
    assert prompts() == ["a", "b"]
    assert prompts(split="test") == ["c", "d"]
    assert prompts(split="test", num_samples=1) == ["c"]
    assert prompts(dataset_config="inner") == ["e", "e"]
    assert prompts(dataset_config="inner/y", split="dev") == ["f"]
    with pytest.raises(ValueError, match=r"entry 1: split is 'dev'; it must be a file of .*: x\.json"):
        prompts(split="dev")
    with pytest.raises(ValueError, match=r"x\.json: split is 'dev', and the file has no splits; it must be left out"):
        prompts(dataset_config="inner/x", split="dev")
    with pytest.raises(ValueError, match=r"dataset_config is 'outer'; .* has no such file or folder"):
        prompts(dataset_config="outer")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"train\.jsonl: line 2, column 10: not JSON"):
        prompts()
    # what comes after so many is not read
    assert prompts(num_samples=1) == ["a"]


def test_a_completion_must_have_text(tokenizer, tmp_path):
    rows = [*PAIRS[:2], {"prompt": "p", "completion": " "}]
    with pytest.raises(ValueError, match=r"x\.jsonl: line 3: its completion is empty; it must have some text"):
        create_dataset([entry(jsonl(tmp_path / "x.jsonl", rows))], tokenizer)
    with pytest.raises(ValueError, match=r"x\.jsonl: line 1: its prompt is empty; it must have some text"):
        create_dataset([entry(jsonl(tmp_path / "x.jsonl", [{"text": "a"}]))], tokenizer)
    with pytest.raises(ValueError, match=r"x\.jsonl has no examples; it must have one"):
        create_dataset([entry(jsonl(tmp_path / "x.jsonl", []))], tokenizer)


def test_long_texts_are_cut_and_said(tokenizer, tmp_path):
    rows = [
        {"prompt": "0123456789", "completion": "a"},
        {"prompt": "0123456789", "completion": "abcdef"},
        {"prompt": "01", "completion": "abcd"},
        {"prompt": "01", "completion": "abcde"},
    ]
    dataset = create_dataset([entry(jsonl(tmp_path / "x.jsonl", rows))], tokenizer, max_length=8)
    # the prompt that is kept does not depend on its completion
    assert [text(tokenizer, dataset, i) for i in range(4)] == [
        ("56789\n", "a<eos>"),
        ("56789\n", "ab"),
        ("01\n", "abcd<eos>"),
        ("01\n", "abcde"),
    ]
    assert dataset.notes == [
        ("pairs", "2 of 4 prompts, from the left"),
        ("pairs", "2 of 4 completions"),
    ]


def test_a_share_of_each_dataset_is_for_validation(tokenizer, tmp_path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", PAIRS[:count]) for name, count in (("a", 20), ("b", 10), ("c", 1))]
    dataset = create_dataset([entry(path) for path in paths], tokenizer)
    train, validation = dataset.split(0.2, seed=3)
    assert sorted([*train, *validation]) == list(range(31))
    assert [sum(dataset.file_ids[i] == number for i in validation) for number in range(3)] == [4, 2, 0]
    assert dataset.split(0.2, seed=3) == (train, validation)
    assert dataset.split(0.2, seed=4) != (train, validation)
    assert dataset.split(0, seed=3) == (list(range(31)), [])
    # other datasets do not move it
    alone = create_dataset([entry(paths[1]), entry(paths[2])], tokenizer)
    assert [i + 20 for i in alone.split(0.2, seed=3)[1]] == [i for i in validation if i >= 20]
    sampler = MixedFileBatchSampler([dataset.file_ids[i] for i in train], 4, seed=0)
    batch = Collator(tokenizer.pad_token_id)([dataset[train[i]] for i in sampler.batch_at(0)])
    assert len(batch["file_id"].unique()) > 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(side, tokenizer, tmp_path):
    rows = [{"prompt": "ab", "completion": "xyz"}, {"prompt": "abcd", "completion": "x"}]
    dataset = create_dataset([entry(jsonl(tmp_path / "x.jsonl", rows))], tokenizer)
    batch = Collator(tokenizer.pad_token_id, side)([dataset[0], dataset[1]])
    assert batch["prompt_lengths"].tolist() == [3, 5]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shown = [tokenizer.decode(row).replace("<pad>", "_") for row in ids]
    assert torch.equal(mask, (ids != tokenizer.pad_token_id).long())
    if side == "left":
        assert shown == ["__ab\n", "abcd\n"]
        assert "labels" not in batch
    else:
        assert shown == ["ab\nxyz<eos>", "abcd\nx<eos>"]
        assert batch["labels"].tolist() == [[-100] * 3 + ids[0, 3:].tolist(), [-100] * 5 + ids[1, 5:].tolist()]
    with pytest.raises(ValueError, match="side is 'top'; it must be right or left"):
        Collator(0, "top")
    with pytest.raises(ValueError, match="items is empty"):
        Collator(0)([])


def test_the_hub(tokenizer, monkeypatch):
    """Where `datasets` is not there, or gives nothing, one line says so."""
    with pytest.raises(ValueError, match=r"entry 1: dataset_path is \./x\.jsonl; there is no such file or folder"):
        create_dataset([entry("./x.jsonl")], tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"owner/name, which is no file .* pip install 'ctxkern\[hub\]'"):
        create_dataset([entry("owner/name")], tokenizer)

    class Hub:
        asked = None

        @classmethod
        def load_dataset(cls, *asked, split):
            cls.asked = (*asked, split)
            if split == "absent":
                raise ConnectionError("no\nnetwork")
            return PAIRS

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    dataset = create_dataset([entry("owner/name", dataset_config="main", num_samples=3)], tokenizer)
    assert Hub.asked == ("owner/name", "main", "train")
    assert (len(dataset), dataset.files) == (3, [])
    with pytest.raises(
        ValueError, match=r"owner/name, which is no file or folder here, and the hub gave none: no netw"
    ):
        create_dataset([entry("owner/name", split="absent")], tokenizer)


@pytest.mark.skipif(not DATA.is_dir(), reason="the data is not there")
def test_published_data(tokenizer):
    config = [
        entry(DATA / "gsm8k", "gsm8k"),
        entry(DATA / "svamp", "svamp"),
        entry(DATA / "bbh" / "bbh", "bbh", dataset_config="web_of_lies"),
    ]
    dataset = create_dataset(config, tokenizer, max_length=2048)
    counts = [dataset.file_ids.count(number) for number in range(3)]
    assert counts == [7473, 1000, 250]
    assert text(tokenizer, dataset, 7473)[1] == " 51<eos>"

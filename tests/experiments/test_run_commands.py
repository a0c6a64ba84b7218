"""What a trained run is used for: `load_run`, `ctxkern generate`, `add-file` and `export`."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.attached import assert_near
from helpers.runs import TINY, failed, write

from ctxkern.cli import main
from ctxkern.experiments.core.checkpoint import CheckpointError
from ctxkern.experiments.multifile.run import load_run
from ctxkern.experiments.multifile.train import Evaluator, prepare


def records(letter, count=40):
    return "".join(json.dumps({"input": f"{i:02}", "target": letter * 3}) + "\n" for i in range(count))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that has learnt to answer with the letter of the file."""
    folder = tmp_path_factory.mktemp("run")
    paths = [write(folder, f"{name}.jsonl", records(name)) for name in "abc"]
    flags = ["--steps", 120, "--lr", 0.01, "--dropout", 0, "--patience", 0, "--no-compare-einsum", "--device", "cpu"]
    assert main(["train", *map(str, paths), *TINY, *map(str, flags), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_is_read_back(run_dir):
    run = load_run(run_dir)
    assert run.names == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [run.file_id(name) for name in ("b.jsonl", "b", "1")] == [1, 1, 1]
    assert not run.model.training
    result = json.loads((run_dir / "result.json").read_text())
    assert run.step == result["best_step"]
    assert load_run(run_dir, checkpoint="last").step == result["step"]
    # the losses that the run has logged
    job = prepare(run.config, [run_dir.parent / name for name in run.names])
    losses = Evaluator(job.validation_data, job.collator, 4, run.config.eval_windows)(run.model)
    assert losses == pytest.approx(result["best"], rel=1e-5)


def test_what_is_no_run_is_named(run_dir, tmp_path):
    with pytest.raises(ValueError, match="it must be the folder of a run"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is 'first'; it must be one of best, last"):
        load_run(run_dir, checkpoint="first")
    for name in ("config.json", "tokenizer.json", "names.json"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    with pytest.raises(CheckpointError, match="the run must have reached a checkpoint"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="file is 'd', which names none of the run's files: a.jsonl, b.jsonl, c"):
        load_run(run_dir).file_id("d")


def test_generation_is_in_the_context_of_a_file(run_dir, capsys):
    for name in "abc":
        assert main(["generate", str(run_dir), "--file", name, "--prompt", "07"]) == 0
        assert capsys.readouterr().out == f"{name * 3}\n"
    assert main(["generate", str(run_dir), "--prompt", "07", "--max-new-tokens", "1"]) == 0
    assert len(capsys.readouterr().out) <= 2
    assert "file is 'd'" in failed(capsys, "generate", run_dir, "--file", "d", "--prompt", "07")
    assert "temperature is -1.0; it must be at least 0" in failed(
        capsys, "generate", run_dir, "--prompt", "07", "--temperature", -1
    )
    assert "it must be the folder of a run" in failed(capsys, "generate", run_dir / "logs", "--prompt", "07")


def test_an_exported_file_needs_torch_alone(run_dir, tmp_path, capsys):
    place = tmp_path / "out" / "b.pt2"
    assert main(["export", str(run_dir), "--file", "b", "--out", str(place)]) == 0
    program = f"""
import sys, torch
model = torch.export.load({str(place)!r}).module()
tokens = torch.tensor([[4, 5, 6], [5, 6, 4], [6, 6, 6]])
torch.save(model(tokens), {str(tmp_path / "logits.pt")!r})
assert "ctxkern" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    run, tokens = load_run(run_dir), torch.tensor([[4, 5, 6], [5, 6, 4], [6, 6, 6]])
    with torch.no_grad():
        expected = run.model(tokens, file_ids=torch.ones(3, dtype=torch.int64))
    assert_near(torch.load(tmp_path / "logits.pt"), expected)
    assert (place.parent / "tokenizer.json").exists()
    assert "it must end in .pt2" in failed(capsys, "export", run_dir, "--file", "b", "--out", tmp_path / "b.onnx")


def test_a_file_is_added_and_nothing_else_changes(run_dir, tmp_path, capsys):
    before = load_run(run_dir)
    path = write(tmp_path, "new.jsonl", records("b", 30))
    assert main(["add-file", str(run_dir), str(path), "--steps", "20"]) == 0
    out = capsys.readouterr().out
    losses = dict(line.strip().rsplit("  ", 1) for line in out.splitlines()[1:5])
    losses = {way.strip(): float(loss) for way, loss in losses.items()}
    assert set(losses) == {
        "no context", "the mean of the known ones", "the best known one, b.jsonl", "adapted from it, 20 steps",
    }  # fmt: skip
    assert losses["adapted from it, 20 steps"] < min(losses["no context"], losses["the mean of the known ones"])
    run = load_run(run_dir)
    assert run.names == [*before.names, "new.jsonl"]
    state = run.model.state_dict()
    for name, value in before.model.state_dict().items():
        assert torch.equal(state[name][: len(value)], value), name
    assert main(["generate", str(run_dir), "--file", "new", "--prompt", "07"]) == 0
    assert capsys.readouterr().out == "bbb\n"
    second = write(tmp_path, "second.jsonl", records("c", 30))
    assert main(["add-file", str(run_dir), str(second), "--name", "other", "--steps", "5"]) == 0
    assert load_run(run_dir).names[3:] == ["new.jsonl", "other"]
    assert "the run has a file of this name" in failed(capsys, "add-file", run_dir, path)
    assert "--steps is 0; it must be at least 1" in failed(capsys, "add-file", run_dir, path, "--steps", 0)
    assert "there is no file" in failed(capsys, "add-file", run_dir, tmp_path / "absent.txt", "--name", "x")
    # the run itself goes on as if nothing had been added
    assert (
        main(["train", "--resume", "--run-dir", str(run_dir), "--steps", "122", "--no-compare-einsum", "--quiet"]) == 0
    )
    assert load_run(run_dir).names[3:] == ["new.jsonl", "other"]

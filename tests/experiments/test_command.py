import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import TINY, error_of, failed, finish, start, wait_for_step
from safetensors.torch import load_file as load_tensors

from ctxkern.cli import main
from ctxkern.experiments.core import command
from ctxkern.experiments.core.runlog import read_metrics

ODD_NAME = os.fsdecode(b"caf\xe9 $x_1$ %\n'q'")


def tensors(run_dir):
    return load_tensors(run_dir / "last.safetensors")


def assert_same_bits(first, second):
    states = tensors(first), tensors(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert read_metrics(first) == read_metrics(second)


def test_a_run_says_what_it_does_and_leaves_its_files(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", str(corpus), *TINY, "--steps", "40", "--lr", "1e-2", "--run-dir", str(run_dir)]) == 0
    out, _ = capsys.readouterr()
    for expected in (
        "files       3: f0.jsonl, f1.jsonl, f2.jsonl",
        "parameters  ",
        "bilinear 3,072",
        "vocabulary  14 characters",
        "attention   ",
        " on ",
        "mean over files",
        "cost        no context ",
        "| einsum ",
        str(run_dir / "loss.png"),
    ):
        assert expected in out
    left = [
        "best.safetensors",
        "config.json",
        "last.safetensors",
        "logs",
        "loss.png",
        "metrics.jsonl",
        "names.json",
        "result.json",
        "tokenizer.json",
    ]
    assert sorted(os.listdir(run_dir)) == left
    means = [row["mean"] for row in read_metrics(run_dir) if "mean" in row]
    assert means[-1] < 0.8 * means[0]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["step"], result["interrupted"], result["best_loss"]) == (40, None, min(means))
    assert result["last"] == read_metrics(run_dir)[-1]["validation"]


def test_no_comparison_where_it_is_not_wanted(corpus, tmp_path, capsys):
    argv = ["train", str(corpus), *TINY, "--steps", "2"]
    assert main([*argv, "--no-compare-einsum", "--run-dir", str(tmp_path / "a")]) == 0
    assert main([*argv, "--attention", "einsum", "--run-dir", str(tmp_path / "b")]) == 0
    out, _ = capsys.readouterr()
    assert "training step" not in out
    assert "attention   einsum" in out


def test_without_validation_it_trains_all_the_same(corpus, tmp_path, capsys):
    argv = ["train", str(corpus), *TINY, "--steps", "2", "--val-fraction", "0", "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    assert "no file has any set apart" in capsys.readouterr()[0]
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_the_debug_preset_takes_two_files_and_one_step(corpus, tmp_path, capsys):
    assert main(["train", str(corpus), "--preset", "debug", "--quiet", "--run-dir", str(tmp_path / "run")]) == 0
    out, _ = capsys.readouterr()
    assert "files       2: f0.jsonl, f1.jsonl" in out
    assert "step 0 and step 1" in out


def test_without_paths_it_trains_on_the_standard_library(tmp_path, capsys):
    assert main(["train", *TINY, "--num-files", "2", "--steps", "1", "--run-dir", str(tmp_path / "run")]) == 0
    assert ".py" in capsys.readouterr()[0]


ERRORS = {
    "path": (["nothing.txt"], "nothing.txt: there is no file, folder or match of this name"),
    "heads": (["{corpus}", "--n-heads", "3"], "n_heads is 3; it must be a divisor of d_model = 128"),
    "init": (["{corpus}", "--init", "ones"], "init is 'ones'; it must be one of normal, hyperfan, low_rank, randn"),
    "tokens": (["{corpus}", "--tokens", "words"], "tokens is 'words'; it must be one of chars, bytes"),
    "lr": (["{corpus}", "--lr", "nan"], "lr is nan; it must be a number above 0"),
    "device": (["{corpus}", "--device", "abacus"], "device is 'abacus', which torch cannot use here"),
    "meta": (["{corpus}", "--device", "meta"], "device is 'meta', which torch cannot use here"),
    "preset": (["{corpus}", "--preset", "huge"], "preset is 'huge'; it must be one of debug"),
    "files": (["{corpus}", "--num-files", "9"], "num_files is 9; it must be at most 3, the number of files"),
    "number": (["--steps", "many"], "argument --steps/--training-steps: invalid int value: 'many'"),
    "flag": (["--stepz", "3"], "unrecognized arguments: --stepz"),
    "resume": (["--resume"], "--resume needs --run-dir"),
    "no run": (["--resume", "--run-dir", "{corpus}"], "holds no run"),
    "large": (["{corpus}", "--context-dim", "1" + "0" * 8], "the model is too large: .* it needs about .* GiB"),
    "larger": (["{corpus}", "--context-dim", "1" + "0" * 15], "the model is too large"),
    "largest": (["{corpus}", "--context-dim", "1" + "0" * 40], "the model is too large"),
    "long": (["{corpus}", "--seq-len", "1" + "0" * 15], "the model is too large"),
    "wide": (["{corpus}", "--d-model", "4000000"], "the model is too large"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(corpus, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    argv, message = ERRORS[name]
    assert re.search(message, failed(capsys, "train", *(arg.format(corpus=corpus) for arg in argv)))
    assert not (tmp_path / "runs").exists()


def test_unreadable_files_are_named_in_one_line(corpus, capsys):
    (corpus / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "bad.jsonl: not UTF-8 text (byte 0xff at offset 10)" in failed(capsys, "train", corpus)


@pytest.mark.parametrize("missing", ["tqdm", "safetensors.torch", "matplotlib"])
def test_missing_extras_say_what_to_install(corpus, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    err = failed(capsys, "train", corpus, *TINY, "--steps", "1", "--run-dir", tmp_path / "run")
    assert "pip install 'ctxkern[train]'" in err


def test_a_run_is_neither_overwritten_nor_mixed(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    base = ["train", str(corpus), *TINY, "--run-dir", str(run_dir), "--no-compare-einsum"]
    assert main([*base, "--steps", "5"]) == 0
    capsys.readouterr()
    assert "already holds a run" in failed(capsys, *base, "--steps", "5")
    resume = ["train", "--resume", "--run-dir", run_dir]
    assert "--lr is 0.5; it must be 0.002, as in the run in" in failed(capsys, *resume, "--lr", "0.5")
    assert "--num-files is 2; it must be left out, as in" in failed(capsys, *resume, "--preset", "debug")
    assert "--balanced is True; it must be False" in failed(capsys, *resume, "--balanced")
    assert "other files" in failed(capsys, *resume[:1], corpus / "f1.jsonl", *resume[1:])
    stored = (run_dir / "config.json").read_bytes()
    assert "--steps is 3; it must be at least 5, the step of the run in" in failed(capsys, *resume, "--steps", "3")
    assert (run_dir / "config.json").read_bytes() == stored
    assert main([*map(str, resume), "--steps", "7", "--no-compare-einsum", "--lr", "0.002"]) == 0
    assert "step 0 and step 7" in capsys.readouterr()[0]
    text = (corpus / "f1.jsonl").read_text()
    (corpus / "f1.jsonl").write_text(text + '{"input": "new", "target": "c"}\n')
    assert "f1.jsonl has changed since" in failed(capsys, *resume)
    (corpus / "f1.jsonl").unlink()
    assert "f1.jsonl is gone" in failed(capsys, *resume)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"train": {"colour": 1}, "files": []}',
        b'{"train": {"d_model": "wide"}, "files": []}',
        b'{"train": {}, "files": [{"path": null, "sha256": ""}]}',
        b"\xff",
    ],
)
def test_a_broken_config_is_named(corpus, tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    failed(capsys, "train", "--resume", "--run-dir", tmp_path)


def test_a_damaged_checkpoint_is_named(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", str(corpus), *TINY, "--steps", "3", "--run-dir", str(run_dir), "--no-compare-einsum"]) == 0
    capsys.readouterr()
    path = run_dir / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "last.safetensors is damaged" in failed(capsys, "train", "--resume", "--run-dir", run_dir, "--steps", "5")


def kill_and_resume(corpus, tmp_path, kills, steps, seed):
    rng = random.Random(seed)
    fixed = [*TINY, "--steps", steps, "--checkpoint-every", 3, "--eval-every", 10, "--no-compare-einsum"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(corpus, *fixed, "--run-dir", whole))
    for kill in range(kills):
        process = start(corpus, *fixed, "--run-dir", parts) if kill == 0 else start("--resume", "--run-dir", parts)
        # any moment of the kill's share of the run, in the middle of a write too
        wait_for_step(process, parts, rng.uniform(kill, kill + 0.9) * steps / kills)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start("--resume", "--run-dir", parts, "--no-compare-einsum"))
    assert_same_bits(whole, parts)
    assert not [name for name in os.listdir(parts) if name.startswith(".writing-")]


def test_a_killed_run_resumes_to_the_same_bits(corpus, tmp_path):
    kill_and_resume(corpus, tmp_path, kills=1, steps=60, seed=0)


@pytest.mark.slow
def test_a_run_killed_ten_times_resumes_to_the_same_bits(corpus, tmp_path):
    kill_and_resume(corpus, tmp_path, kills=10, steps=1500, seed=1)


def test_sigterm_ends_the_command_with_the_way_to_resume(corpus, tmp_path):
    run_dir = tmp_path / "run"
    process = start(corpus, *TINY, "--steps", 100_000, "--eval-every", 50_000, "--run-dir", run_dir)
    wait_for_step(process, run_dir, 10)
    process.send_signal(signal.SIGTERM)
    out = finish(process, 128 + signal.SIGTERM)
    assert f"ctxkern train --resume --run-dir {run_dir}" in out
    assert "Traceback" not in out
    assert (run_dir / "last.safetensors").exists()


def test_all_bad_files_are_listed_at_once_or_skipped(corpus, tmp_path, capsys):
    (corpus / "g.json").write_text("{")
    (corpus / "h.txt").symlink_to("gone")
    (corpus / "i.txt").write_text("")
    (corpus / "j.json").write_text('[{"question": "a", "answer": "b", "id": 1}]')
    err = error_of(capsys, "train", corpus, "--run-dir", tmp_path / "run")
    lines = err.splitlines()
    assert lines[0] == "ctxkern train: 2 files cannot be read (--skip-bad leaves them out):"
    assert lines[1] == f"  {corpus}/h.txt: a symbolic link to gone, which does not exist"
    assert lines[2].startswith(f"  {corpus}/g.json: line 1, column 2: not JSON")
    assert not (tmp_path / "run").exists()
    argv = ["train", str(corpus), *TINY, "--steps", "2", "--no-compare-einsum", "--run-dir", str(tmp_path / "run")]
    assert main([*argv, "--skip-bad", "--num-files", "9"]) == 2
    assert "num_files is 9; it must be at most 6" in capsys.readouterr()[1]
    assert main([*argv, "--skip-bad", "--num-files", "5"]) == 0
    out = capsys.readouterr()[0]
    for expected in (
        "files       4: f0.jsonl, f1.jsonl, f2.jsonl, j.json",
        f"skipped     {lines[1].strip()}",
        f"skipped     {lines[2].strip()}",
        "note        j.json: fields not used: id",
        f"left out    {corpus}/i.txt: it is empty",
    ):
        assert expected in out
    # the files that are left are those of the run
    assert main(["train", "--resume", "--run-dir", str(tmp_path / "run"), "--steps", "3", "--no-compare-einsum"]) == 0


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("nonsense", marks=pytest.mark.slow),
        "qtagg",
        pytest.param("module://nowhere", marks=pytest.mark.slow),
    ],
)
def test_any_plot_backend_and_any_names(tmp_path, backend):
    """In one run: unusable backend, ASCII terminal, names of any bytes for files and folder, then another locale."""
    folder, run_dir = tmp_path / "data", tmp_path / ODD_NAME
    folder.mkdir()
    rows = "".join(json.dumps({"input": str(i), "target": "ab"}) + "\n" for i in range(20))
    for name in (b"caf\xe9.jsonl", b"two\nlines.jsonl", b"$x_1$ 100%.jsonl", b"$\\frac{.jsonl", "é中.jsonl".encode()):
        (folder / os.fsdecode(name)).write_text(rows)
    ascii_only = {"MPLBACKEND": backend, "PYTHONIOENCODING": "ascii"}
    out = finish(start(folder, *TINY, "--steps", 3, "--no-compare-einsum", "--run-dir", run_dir, **ascii_only))
    for shown in (r"caf\xe9.jsonl", r"two\nlines.jsonl", "$x_1$ 100%.jsonl", r"$\frac{.jsonl", r"\xe9\u4e2d.jsonl"):
        assert shown in out
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(run_dir / "logs")
    no_utf8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    again = finish(start("--resume", "--run-dir", run_dir, "--steps", 5, "--no-compare-einsum", **no_utf8))
    assert "step 0 and step 5" in again
    assert set(read_metrics(run_dir)[-1]["validation"]) == set(read_metrics(run_dir)[0]["validation"])


def test_the_command_to_resume_can_be_pasted(corpus, tmp_path):
    run_dir = tmp_path / ODD_NAME
    process = start(corpus, *TINY, "--steps", 100_000, "--eval-every", 50_000, "--run-dir", run_dir)
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGINT)
    out = finish(process, 128 + signal.SIGINT)
    command = out.partition("continue with:\n")[2].splitlines()[0].strip()
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"]).split(b"\0")
    assert words[:-1] == [b"ctxkern", b"train", b"--resume", b"--run-dir", os.fsencode(run_dir)]
    assert json.loads((run_dir / "result.json").read_text())["interrupted"] == "SIGINT"


def test_a_failing_plot_is_a_warning_after_all_numbers(corpus, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"

    def fail(*args, **kwargs):
        assert {"result.json", "last.safetensors", "metrics.jsonl", "config.json"} <= set(os.listdir(run_dir))
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(command, "plot_losses", fail)
    assert main(["train", str(corpus), *TINY, "--steps", "2", "--run-dir", str(run_dir)]) == 0
    out, err = capsys.readouterr()
    assert err == "ctxkern train: warning: no plot was drawn: no font\n"
    assert "mean over files" in out
    assert "training step" in out
    assert "loss.png" not in out


def test_memory_that_runs_out_in_training_is_one_line(corpus, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory: tried to allocate\n9 GiB")

    monkeypatch.setattr(command, "train", fail)
    err = failed(capsys, "train", corpus, *TINY, "--run-dir", tmp_path / "run")
    assert "memory ran out: out of memory: tried to allocate 9 GiB" in err


def test_a_run_of_another_experiment_is_not_resumed(corpus, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"experiment": "toy", "train": {}, "files": []}')
    assert "holds a run of `ctxkern toy`" in failed(capsys, "train", "--resume", "--run-dir", tmp_path)

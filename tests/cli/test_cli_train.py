import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as load_tensors

import ctxkern
from ctxkern.cli import main
from ctxkern.cli.train import FLAGS
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.config import TrainConfig

SIZES = {"d-model": 16, "n-heads": 2, "n-layers": 1, "context-dim": 4, "seq-len": 16, "batch-size": 4, "dropout": 0.1}
TINY = [*(part for name, value in SIZES.items() for part in (f"--{name}", str(value))), "--quiet"]
PACKAGE = Path(ctxkern.__file__).parent.parent


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        rows = ({"input": f"{j} {i}", "target": "abc"[i] * (1 + j % 3)} for j in range(20 + 10 * i))
        (folder / f"f{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def failed(capsys, *argv):
    """The one line on stderr of a command that must exit with 2."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def tensors(run_dir):
    return load_tensors(run_dir / "last.safetensors")


def assert_same_bits(first, second):
    states = tensors(first), tensors(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert read_metrics(first) == read_metrics(second)


def test_every_setting_has_a_flag_and_the_help_says_its_default():
    names = {name: text for _, name, _, text in FLAGS}
    assert {*names, "balanced"} == set(TrainConfig.names())
    for field in fields(TrainConfig):
        if field.default is not None and field.name != "balanced":
            assert f"(default: {field.default})" in names[field.name], field.name


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
        "training step ",
        "with the einsum module",
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
        "tokenizer.json",
    ]
    assert sorted(os.listdir(run_dir)) == left
    means = [row["mean"] for row in read_metrics(run_dir) if "mean" in row]
    assert means[-1] < 0.8 * means[0]


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
    "path": (["nothing.txt"], "there is no file, folder or match of nothing.txt"),
    "heads": (["{corpus}", "--n-heads", "3"], "n_heads: got 3, takes a divisor of d_model"),
    "init": (["{corpus}", "--init", "ones"], "init: got 'ones', takes one of"),
    "tokens": (["{corpus}", "--tokens", "words"], "tokens: got 'words'"),
    "device": (["{corpus}", "--device", "abacus"], "device: got 'abacus'"),
    "preset": (["{corpus}", "--preset", "huge"], "preset: got 'huge', takes one of ('debug',)"),
    "files": (["{corpus}", "--num-files", "9"], "num_files: got 9, but 3 paths"),
    "number": (["--steps", "many"], "argument --steps/--training-steps: invalid int value: 'many'"),
    "flag": (["--stepz", "3"], "unrecognized arguments: --stepz"),
    "resume": (["--resume"], "--resume: takes --run-dir"),
    "no run": (["--resume", "--run-dir", "{corpus}"], "holds no run"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(corpus, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    argv, message = ERRORS[name]
    assert message in failed(capsys, "train", *(arg.format(corpus=corpus) for arg in argv))
    assert not (tmp_path / "runs").exists()


def test_unreadable_files_are_named_in_one_line(corpus, capsys):
    (corpus / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "bad.jsonl: not UTF-8 text" in failed(capsys, "train", corpus)


def test_commands_are_asked_for(capsys):
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert main(["--version"]) == 0
    assert ctxkern.__version__ in capsys.readouterr()[0]


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
    assert "--lr: got 0.5, but the run in" in failed(capsys, *resume, "--lr", "0.5")
    assert "has 0.002" in failed(capsys, *resume, "--lr", "0.5")
    assert "--num-files: got 2, but" in failed(capsys, *resume, "--preset", "debug")
    assert "--balanced: got True" in failed(capsys, *resume, "--balanced")
    assert "other files" in failed(capsys, *resume[:1], corpus / "f1.jsonl", *resume[1:])
    stored = (run_dir / "config.json").read_bytes()
    assert "--steps: got 3, but" in failed(capsys, *resume, "--steps", "3")
    assert (run_dir / "config.json").read_bytes() == stored
    assert main([*map(str, resume), "--steps", "7", "--no-compare-einsum", "--lr", "0.002"]) == 0
    assert "step 0 and step 7" in capsys.readouterr()[0]
    text = (corpus / "f1.jsonl").read_text()
    (corpus / "f1.jsonl").write_text(text + '{"input": "new", "target": "c"}\n')
    assert "f1.jsonl has changed since" in failed(capsys, *resume)
    (corpus / "f1.jsonl").unlink()
    assert "f1.jsonl is gone" in failed(capsys, *resume)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"train": {"colour": 1}, "files": []}'])
def test_a_broken_config_is_told(corpus, tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    failed(capsys, "train", "--resume", "--run-dir", tmp_path)


def test_a_damaged_checkpoint_is_told(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", str(corpus), *TINY, "--steps", "3", "--run-dir", str(run_dir), "--no-compare-einsum"]) == 0
    capsys.readouterr()
    path = run_dir / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "last.safetensors is damaged" in failed(capsys, "train", "--resume", "--run-dir", run_dir, "--steps", "5")


def start(*argv):
    env = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ctxkern", "train", *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    return out


def wait_for_step(process, run_dir, step):
    """Until the log of the run has reached ``step``."""
    while process.poll() is None:
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"ended before step {step}: {process.communicate()[0]}")


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

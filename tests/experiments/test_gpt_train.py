"""`ctxkern gpt`: training with every size a flag, kills and resumes, stops, text, and ways compared."""

import csv
import json
import math
import os
import signal

import pytest
import torch
from helpers.runs import DATA, KilledError, failed, finish, start, stop_at, wait_for_step, write
from safetensors.torch import load_file

from ctxkern.cli import build_parser, main
from ctxkern.experiments.core.data.paths import FoundFiles
from ctxkern.experiments.core.experiment import Inputs, train
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.gpt import compare
from ctxkern.experiments.gpt.config import GPTSettings
from ctxkern.experiments.gpt.run import load_run
from ctxkern.experiments.gpt.train import criterion, mean_loss, prepare

SIZES = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --eval-iters 2 --warmup-steps 2".split()
FLAGS = [*SIZES, "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts whose characters say which one it is."""
    folder = tmp_path_factory.mktemp("texts")
    return [write(folder, f"{name}.txt", f"the {name} of {name}\r\n" * 60) for name in ("cat", "dove")]


def run_train(run_dir, *argv, status=0):
    assert main([str(part) for part in ("gpt", "train", *argv, *FLAGS, "--run-dir", run_dir)]) == status
    return run_dir


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    often = ("--steps", 40, "--dropout", 0.1, "--checkpoint-every", 7, "--log-every", 1, "--lr", 0.01)
    return run_train(tmp_path_factory.mktemp("runs") / "whole", *texts, *often, "--context-dim", 4)


def settings(**changes):
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "block_size": 8, "batch_size": 4, "eval_iters": 2}
    return GPTSettings(**{"training_steps": 12, "device": "cpu", "warmup_steps": 0} | sizes | changes)


def job_of(texts, **changes):
    return prepare(settings(**changes), Inputs(FoundFiles(list(texts))))


def test_a_run_learns_and_leaves_everything(trained, texts, capsys):
    result = json.loads((trained / "result.json").read_text())
    assert set(result["details"]["whole"]) == {"cat.txt", "dove.txt"}
    assert all(result["last"][name] < 0.8 * loss for name, loss in result["first"].items())
    assert {"train_estimate", "validation_by_token"} <= result["observed"].keys()
    for name in ("best.safetensors", "last.safetensors", "loss.png", "metrics.jsonl", "config.json"):
        assert (trained / name).stat().st_size > 0
    assert (trained / "vocab.txt").read_text() == "\n acdefhotv"
    assert (trained / "vocab.txt").read_bytes().count(b"\r") == 0
    # no pickle anywhere
    assert {path.suffix for path in trained.iterdir() if path.is_file()} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".png",
        ".txt",
    }


def test_whole_losses_are_means_over_all_targets(trained, texts):
    run = load_run(trained, checkpoint="last")
    job = job_of(texts, context_dim=4)
    job.model.load_state_dict(run.model.state_dict())
    stored = json.loads((trained / "result.json").read_text())["details"]["whole"]
    for file_id, name in enumerate(job.data.names):
        span = job.data.spans["validation"][file_id]
        ids = job.data.tokenizer.encode(span.read(span.start, len(span)))
        losses, windows = [], range(0, len(ids) - 1, 8)
        for first in windows:
            piece = torch.tensor([ids[first : first + 9]])
            logits = run.model(piece[:, :-1], file_ids=torch.tensor([file_id]))
            losses += [criterion(logits, piece[:, 1:]).item()] * (piece.shape[1] - 1)
        assert stored[name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert math.isnan(mean_loss(job.model, [])[0])


def test_estimates_are_of_the_same_batches_and_without_dropout(texts):
    job = job_of(texts, dropout=0.5)
    job.model.train()
    first, second = (job.estimate_loss(job.model, "validation", 0) for _ in range(2))
    assert first == second
    assert job.model.training
    assert first[1] == 2 * 4 * 8
    assert job.estimate_loss(job.model, "validation", 1) != first
    assert job_of(texts, seed=1).estimate_loss(job.model, "validation", 0) != first
    assert job_of(texts, val_fraction=0.0).evaluator() is None


def test_another_text_may_be_validated_on(texts):
    job = job_of(texts[:1], val_file=str(texts[1]))
    assert job.whole_losses(job.model).keys() == job.evaluator()(job.model).keys() == {"dove.txt"}
    assert len(job.data.spans["train"][0]) == texts[0].stat().st_size


def test_every_size_reaches_the_model(texts):
    job = job_of(
        texts, n_layers=3, n_heads=4, d_model=8, block_size=5, mlp_ratio=2.0, norm="post", activation="relu",
        context_dim=3, rank=2, dropout=0.3,
    )  # fmt: skip
    model, block = job.model, job.model.blocks[0]
    assert (len(model.blocks), block.attention.n_heads, block.attention.rank) == (3, 4, 2)
    assert model.position_embeddings.weight.shape == (5, 8)
    assert model.context_embeddings.weight.shape == (2, 3)
    assert block.mlp[0].weight.shape == (16, 8)
    assert (block.norm, type(block.mlp[1])) == ("post", torch.nn.ReLU)
    assert (model.dropout.p, block.dropout.p, block.attention.dropout) == (0.3, 0.3, 0.3)
    groups = {id(p): group for group in job.optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    assert groups[id(model.head.weight)]["weight_decay"] == 0.1
    assert groups[id(model.head.bias)]["weight_decay"] == 0.0
    assert groups[id(model.context_embeddings.weight)]["lr"] == pytest.approx(1e-2)
    assert job.optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_a_kill_and_a_resume_end_in_the_same_bits(texts, tmp_path):
    changes = {
        "dropout": 0.1,
        "schedule": "plateau",
        "plateau_patience": 0,
        "eval_every": 2,
        "checkpoint_every": 5,
        "lr": 0.1,
    }
    whole = job_of(texts, **changes)
    result = train(whole, tmp_path / "whole", progress=False)
    rates = [row["lr"] for row in read_metrics(tmp_path / "whole") if "lr" in row]
    # otherwise the schedule's state is not seen
    assert rates[-1] < rates[0]
    parts = job_of(texts, **changes)
    parts.loss = stop_at(parts.loss, 8)
    with pytest.raises(KilledError):
        train(parts, tmp_path / "parts", progress=False)
    parts = job_of(texts, **changes)
    assert train(parts, tmp_path / "parts", resume=True, progress=False) == result
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    for (name, value), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_process_that_was_killed_goes_on(texts, tmp_path):
    def run(*argv):
        # processes alone: what tests before have set in this one may change bits
        return start("gpt", "train", *argv, program=("-m", "ctxkern"))

    argv = [*texts, *FLAGS, "--steps", 40, "--dropout", 0.1, "--checkpoint-every", 7, "--log-every", 1, "--lr", 0.01]
    whole, run_dir = tmp_path / "whole", tmp_path / "parts"
    process = run(*argv, "--context-dim", 4, "--run-dir", run_dir)
    wait_for_step(process, run_dir, 11)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # the vocabulary is that of the start
    finish(run("--resume", "--quiet", "--run-dir", run_dir))
    finish(run(*argv, "--context-dim", 4, "--run-dir", whole))
    one, other = (load_file(place / "last.safetensors") for place in (whole, run_dir))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (run_dir / "result.json").exists()


def test_an_early_stop_stops(texts, tmp_path, capsys):
    run_dir = run_train(
        tmp_path / "run",
        *texts,
        "--steps",
        200,
        "--eval-every",
        2,
        "--patience",
        3,
        "--min-improvement",
        0.5,
        "--lr",
        0.01,
    )
    assert "the mean validation loss was not lower by 0.5 of it in 3 evaluations" in capsys.readouterr().out
    assert json.loads((run_dir / "result.json").read_text())["step"] == 6


def test_words_on_what_is_wrong(texts, tmp_path, capsys):
    def words(*argv, paths=texts):
        return failed(capsys, "gpt", "train", *paths, "--run-dir", tmp_path / "none", *argv)

    assert "n_heads is 3; it must be a divisor of d_model = 128" in words("--n-head", "3")
    assert "block_size is 0; it must be an integer of at least 1" in words("--block-size", "0")
    assert "preset is 'large'; it must be one of document, debug" in words("--preset", "large")
    assert "absent.txt: there is no file" in words(paths=[tmp_path / "absent.txt"])
    assert "empty.txt: it is empty" in words(paths=[write(tmp_path, "empty.txt", "")])
    assert "No such file" in words("--vocab", tmp_path / "vocab.txt")
    assert "val_file is" in words("--val-file", texts[0], "--context-dim", "4")
    assert "the model is too large" in words("--n-embd", "400000")
    assert not (tmp_path / "none").exists()


def test_what_is_left_out_is_said(texts, tmp_path, capsys):
    vocab = write(tmp_path, "vocab.txt", "the cat\n")
    run_dir = run_train(tmp_path / "run", *texts, "--vocab", vocab, "--steps", 2)
    out = capsys.readouterr().out
    assert "vocabulary  7 characters" in out
    assert "note        cat.txt: 120 characters that the vocabulary lacks, left out: 'f', 'o'" in out
    assert "note        dove.txt: 480 characters that the vocabulary lacks, left out: 'd', 'f', 'o', 'v'" in out
    # a run goes on with the vocabulary that it began with
    vocab.write_text("other")
    assert main(["gpt", "train", "--resume", "--quiet", "--run-dir", str(run_dir), "--steps", "3"]) == 0
    assert load_run(run_dir).tokenizer.characters == sorted("the ca\n")


def test_a_text_to_validate_on_is_part_of_the_run(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = write(tmp_path, "val.txt", "the cat of dove\n" * 20)
    run_dir = run_train(tmp_path / "run", *texts, "--val-file", "val.txt", "--steps", 2)
    resume = ["--resume", "--quiet", "--run-dir", str(run_dir)]
    # given as before, from the folder of before
    assert main(["gpt", "train", *resume, "--steps", "3", "--val-file", "val.txt"]) == 0
    assert main(["gpt", "train", *map(str, texts), *resume, "--steps", "4"]) == 0
    other.write_text("the dove of cat\n" * 20)
    assert "val.txt has changed since the run" in failed(capsys, "gpt", "train", *resume, "--steps", "5")


def test_texts_of_other_characters_and_without_validation(texts, tmp_path, capsys):
    vocab = write(tmp_path, "vocab.txt", "the cat\n")
    mixed = write(tmp_path, "mixed.txt", ("ж" * 50 + "the cat\n" * 2) * 20)
    run_dir = run_train(tmp_path / "run", mixed, "--vocab", vocab, "--steps", 6, "--accumulate", 4)
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run_dir) if "loss" in row)
    for flags, words in (
        (("--patience", 1), "patience is 1; it must be 0 where no text is left to validate on"),
        (("--schedule", "plateau"), "schedule is 'plateau'; it must be 'cosine' where no text is left"),
    ):
        argv = ["gpt", "train", *texts, "--run-dir", tmp_path / "none", "--val-fraction", 0, *flags]
        assert words in failed(capsys, *argv)


def test_generate(trained, tmp_path, capsys):
    def said(*more, status=0):
        argv = ["gpt", "generate", str(trained), "--max-new-tokens", "40", "--device", "cpu", *more]
        assert main(argv) == status
        return capsys.readouterr()

    capsys.readouterr()
    out = said("--prompt", "the c").out
    assert out.startswith("the c")
    assert len(out) == 5 + 40 + 1
    assert said("--prompt", "the c").out == out
    assert said("--prompt", "the c", "--no-cache").out == out
    assert said("--prompt", "the c", "--seed", "1").out != out
    greedy = said("--prompt", "the", "--temperature", "0").out
    assert said("--prompt", "the", "--temperature", "1e-60", "--seed", "9" * 30).out == greedy
    assert said("--prompt", "the", "--top-k", "1").out == said("--prompt", "the", "--top-p", "1e-9").out == greedy
    unknown = said("--prompt", "théX c")
    assert unknown.out == said("--prompt", "th c").out
    assert "the vocabulary lacks 'X', 'é' of --prompt" in unknown.err
    assert said("--file", "cat", "--keep", "8").out != said("--file", "dove", "--keep", "8").out
    run = ("gpt", "generate", trained)
    assert "--prompt is 'É'; it must have a character of the run's vocabulary" in failed(capsys, *run, "--prompt", "É")
    assert "file is 'cow', which names none of the run's texts: cat.txt, dove.txt" in failed(
        capsys, *run, "--file", "cow"
    )
    assert "--max-new-tokens is 0; it must be at least 1" in failed(capsys, *run, "--max-new-tokens", "0")
    assert "temperature is -1.0; it must be at least 0" in failed(capsys, *run, "--temperature", "-1")
    assert "keep is 9; it must be from 1 to seq_len = 8" in failed(capsys, *run, "--keep", "9")
    assert "config.json is missing" in failed(capsys, "gpt", "generate", tmp_path)
    assert "a run of `ctxkern gpt train`; it must be one of `train`" in failed(
        capsys, "generate", trained, "--prompt", "a"
    )


def test_ways_are_compared_at_equal_steps(texts, tmp_path, capsys):
    place = tmp_path / "compared"
    argv = list(map(str, ["gpt", "compare", *texts, *FLAGS, "--steps", 3, "--run-dir", place, "--seed", 1]))
    assert main([*argv, "--ways", "contexts"]) == 0
    rows = list(csv.DictReader((place / "compare.csv").open()))
    assert [(row["way"], row["text"], row["seed"]) for row in rows] == [
        ("contexts", f"{text}.txt", "1") for text in ("cat", "dove")
    ]
    assert {row["steps"] for row in rows} == {"3"}
    stored = json.loads((place / "runs" / "contexts-seed-1" / "result.json").read_text())["details"]
    assert float(rows[-1]["loss"]) == stored["whole"]["dove.txt"]
    config = json.loads((place / "runs" / "contexts-seed-1" / "config.json").read_text())["train"]
    assert (config["context_dim"], config["seed"]) == (16, 1)
    assert (place / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "mean over texts" in capsys.readouterr().out
    assert "--ways has 'one'; it must be one of alone, shared, contexts" in failed(capsys, *argv, "--ways", "one")
    assert "--context-dim is 0; it must be at least 1 here" in failed(capsys, *argv, "--context-dim", "0")
    assert "--val-file is given; it must be left out" in failed(capsys, *argv, "--val-file", texts[0])
    assert "holds 'contexts-seed-1' with other settings" in failed(capsys, *argv, "--lr", "0.1", "--ways", "contexts")


def test_runs_of_a_comparison(texts, tmp_path):
    argv = [
        "gpt",
        "compare",
        *map(str, texts),
        "--run-dir",
        str(tmp_path),
        "--seeds",
        "2",
        "--lr",
        "0.1",
        "--rank",
        "3",
    ]
    points = compare.plan(build_parser().parse_args(argv), texts)
    assert [(point.way, point.texts, point.seed) for point in points] == [
        row
        for seed in (0, 1)
        for row in (
            ("alone", ("cat.txt",), seed),
            ("alone", ("dove.txt",), seed),
            ("shared", ("cat.txt", "dove.txt"), seed),
            ("contexts", ("cat.txt", "dove.txt"), seed),
        )
    ]
    assert len({point.run.name for point in points}) == len(points)
    for point in points:
        args = build_parser().parse_args([*point.run.arguments, "--run-dir", "x"])
        given = GPTSettings.given(args)
        assert (given["lr"], given["seed"], len(args.paths)) == (0.1, point.seed, len(point.texts))
        # settings of contexts are for them alone
        assert (given.get("rank"), given.get("context_dim")) == ((3, 16) if point.way == "contexts" else (None, None))


def test_the_table_pairs_by_text_and_seed(tmp_path):
    losses = {("shared", "a", 0): 2.0, ("shared", "b", 0): 3.0, ("contexts", "a", 0): 1.5, ("contexts", "b", 0): 3.25}
    rows = [
        {"way": way, "text": text, "seed": seed, "loss": loss, "steps": 3} for (way, text, seed), loss in losses.items()
    ]
    lines = [line.split() for line in compare.table(rows).splitlines()]
    assert lines[1] == ["a", "2.0000", "1.5000", "-0.5000"]
    assert lines[2] == ["b", "3.0000", "3.2500", "+0.2500"]
    assert lines[3] == ["mean", "over", "texts", "2.5000", "2.3750", "-0.1250"]
    compare.plot(rows, tmp_path / "compare.png", "title")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tiny_shakespeare(tmp_path):
    path = DATA / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    assert main(["gpt", "train", str(path), "--quiet", "--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["details"]["vocabulary"] == 65
    assert result["details"]["whole"]["input.txt"] < 1.88

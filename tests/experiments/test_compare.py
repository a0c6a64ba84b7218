"""`ctxkern compare`: equal splits, resumed sets, and differences paired by file."""

import csv
import json
import math
import signal
import time

import pytest
import torch
from helpers.runs import SIZES, failed, finish, start, tiny
from torch.testing import assert_close

from ctxkern.experiments.core.command import CommandError
from ctxkern.experiments.core.intervals import interval
from ctxkern.experiments.core.runs import PlannedRun, read_result, run_all
from ctxkern.experiments.multifile.comparison import study
from ctxkern.experiments.multifile.comparison.arms import ARMS, equal_width
from ctxkern.experiments.multifile.comparison.results import summarise
from ctxkern.experiments.multifile.comparison.study import Study
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.experiments.multifile.train import prepare

FLAGS = [f"{TrainConfig.flag(name)}={value}" for name, value in SIZES.items()] + ["--device=cpu"]


def row(arm, seed, file, loss):
    more = {"exact": None, "majority": None, "step_ms": 1.0, "peak_mib": None, "steps": 5, "run": f"{arm}-{seed}"}
    return {"arm": arm, "seed": seed, "file": file, "loss": loss, "parameters": 7, "tuned_lr": 0.5, **more}


def summaries(*losses):
    rows = [row(arm, s, f, pair[i]) for i, arm in enumerate(("none", "film")) for (f, s), pair in losses]
    results = {one["run"]: {"observed": {"loss_at/0-7": len(one["arm"]) + one["seed"]}} for one in rows}
    return summarise(rows, results)


def test_differences_are_paired_by_file_and_seed():
    first, second = summaries(
        (("a", 0), (3.0, 2.5)), (("a", 1), (2.0, 1.9)), (("b", 0), (9.0, 9.2)), (("b", 1), (8.0, 8.0))
    )
    assert (first.arm, second.arm) == ("film", "none")
    # by file: -0.3 and 0.1
    assert_close(first.delta, -0.1)
    assert_close(list(first.by_file.values()), [-0.3, 0.1])
    assert (first.won, first.files, second.delta) == (1, 2, 0.0)
    assert first.by_position == {"0-7": 4.5}
    # all files of the first: its seeds, -0.5 and -0.1; none of them is nearer to 0 than the second's, 0.2
    assert first.low < -0.3 < 0.1 < first.high
    assert (second.low, second.high) == (0.0, 0.0)
    assert math.isnan(first.exact)
    assert first.tuned == {"lr": 0.5}


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """Of 200 sets of 30 files by 3 seeds whose mean is 1: a bootstrap over so few files is a little narrow."""
    rng = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        files = 1 + torch.randn(30, 1, generator=rng) + torch.randn(30, 3, generator=rng)
        low, high = interval(files)
        held += low <= 1 <= high
    # binomial: 0.95 of 200 and three standard deviations
    assert 180 <= held <= 199


def test_an_interval_of_one_number_is_that_number():
    assert interval(torch.tensor([[0.25]])) == (0.25, 0.25)


def test_files_without_validation_are_left_out():
    first, _ = summaries((("a", 0), (3.0, 2.5)), (("b", 0), (None, None)))
    assert (first.files, first.delta) == (1, -0.5)


def test_the_wider_model_has_as_many_parameters():
    config = tiny()
    width = equal_width(config, 30, 3)

    def count(**changes):
        settings = {name: getattr(config, name) for name in TrainConfig.names()} | changes
        model = MultiFileTransformer(TrainConfig(**settings).model_config(30, 3))
        return sum(parameter.numel() for parameter in model.parameters())

    aim, step = count(form="bilinear"), config.n_heads
    near, *others = (abs(count(form="none", d_model=wide) - aim) for wide in (width, width - step, width + step))
    assert width % step == 0
    assert near <= min(others)


def test_tuning_takes_the_best_of_each_knob_in_turn(monkeypatch, tmp_path):
    """The learning rate first, at the first value of the knobs; a value that was run is not run again."""
    asked = []

    def run_all(runs, folder, *, workers):
        asked.append([run.name for run in runs])
        best = {"tune-added-context_lr_scale1-context_std0.02-lr1": 1.0}
        best["tune-added-context_lr_scale1-context_std0.2-lr1"] = 0.5
        best["tune-added-context_lr_scale5-context_std0.2-lr1"] = 0.7
        return {name: {"best_loss": best.get(name, 2.0)} for name in asked[-1]}

    monkeypatch.setattr(study, "run_all", run_all)
    one = Study(tmp_path, ["f"], ["f"], {"lr": 0.5}, ["added"], 8, 1, 10, 1)
    one.tune()
    assert one.tuned == {"added": {"lr": 1.0, "context_std": 0.2, "context_lr_scale": 1.0}}
    assert [len(names) for names in asked] == [3, 2, 2]


def test_arms_differ_in_their_settings_alone(tmp_path):
    one = Study(tmp_path, ["f"], ["a", "b"], {"training_steps": 100}, list(ARMS), 12, 1, 0, 1)
    flags = {arm: [run.arguments for run, _ in one.plan("x", arm, 100, 3)] for arm in ARMS}
    assert [len(flags[arm]) for arm in ("none", "own-total", "own-steps")] == [1, 2, 2]
    assert {"--only=b", "--steps=50", "--form=none"} <= set(flags["own-total"][1])
    assert {"--only=b", "--steps=100"} <= set(flags["own-steps"][1])
    assert {"--d-model=12", "--form=none"} <= set(flags["wider"][0])
    for arm in ARMS:
        assert {"--seed=3", "--patience=0"} <= set(flags[arm][0])


def test_what_is_not_tuned_stays_as_it_was_given(tmp_path):
    one = Study(tmp_path, ["f"], ["a"], {"context_lr_scale": 3.0}, ["film", "added"], 12, 1, 0, 1)
    for arm in one.arms:
        ((run, _),) = one.plan("x", arm, 10, 0, **one.tuned[arm])
        assert "--context-lr-scale=3.0" in run.arguments
        assert not any(word.startswith("--context-std") for word in run.arguments)


def test_a_model_alone_has_the_split_of_all(paths):
    together, alone = prepare(tiny(), paths), prepare(tiny(only="f1.jsonl"), paths)
    held = [
        [job.dataset.data[i] for i in job.dataset.indices("validation") if job.dataset.file_ids[i] == file_id]
        for job, file_id in ((together, 1), (alone, 0))
    ]
    assert held[0] == held[1]
    assert alone.dataset.num_files == 1
    assert alone.tokenizer.vocab_size == together.tokenizer.vocab_size
    with pytest.raises(ValueError, match="only is 'g'; it must be one of the files: f0.jsonl, f1.jsonl, f2.jsonl"):
        prepare(tiny(only="g"), paths)


@pytest.mark.slow
def test_a_comparison_writes_its_results_and_is_not_run_twice(paths, tmp_path, capsys):
    folder = tmp_path / "compare"
    argv = ["compare", *paths[:2], "--run-dir", folder, "--arms", "none,lora", "--seeds", 2, "--steps", 3, *FLAGS]
    out = finish(start(*argv, "--no-tune", program=("-m", "ctxkern")))
    assert "lora" in out
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["arm"], r["seed"], r["file"]) for r in rows} == {
        (arm, seed, name) for arm in ("none", "lora") for seed in "01" for name in ("f0.jsonl", "f1.jsonl")
    }
    names = {"results.csv", "table.csv", "positions.csv", "compare.png", "positions.png"}
    assert names <= {path.name for path in folder.iterdir()}
    result = json.loads((folder / "lora-seed1" / "result.json").read_text())
    before = (folder / "lora-seed1" / "result.json").stat().st_mtime_ns
    assert result["step"] == 3
    again = finish(start(*argv, "--no-tune", program=("-m", "ctxkern")))
    assert again == out
    assert (folder / "lora-seed1" / "result.json").stat().st_mtime_ns == before


def test_bad_arms_are_named(paths, tmp_path, capsys):
    flags = ["compare", *paths, "--run-dir", tmp_path / "c"]
    assert "--arms has 'lara'; it must be of none, token" in failed(capsys, *flags, "--arms", "lara")
    assert "--seeds is 0; it must be at least 1" in failed(capsys, *flags, "--seeds", 0)
    assert "--form is given; it must be left to the comparison" in failed(capsys, *flags, "--form", "film")
    assert "--rank is given; it must be left to the comparison" in failed(capsys, *flags, "--rank", 4)


def test_a_failed_run_is_said_with_its_last_lines(paths, tmp_path):
    runs = [PlannedRun("bad", ["train", str(paths[0]), "--n-heads", "3"])]
    with pytest.raises(CommandError, match="(?s)the run 'bad' failed; .*n_heads is 3"):
        run_all(runs, tmp_path, progress=False)
    with pytest.raises(CommandError, match="holds 'bad' with other settings"):
        run_all([PlannedRun("bad", ["train", str(paths[0]), "--n-heads", "4"])], tmp_path, progress=False)


@pytest.mark.slow
def test_a_stopped_set_goes_on(paths, tmp_path):
    folder = tmp_path / "compare"
    argv = ["compare", *paths, "--run-dir", folder, "--arms", "none,film", "--seeds", 1, "--steps", 400, *FLAGS]
    process = start(*argv, "--no-tune", program=("-m", "ctxkern"))
    deadline = time.monotonic() + 120
    while not (folder / "none-seed0" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in finish(process, 130)
    assert read_result(folder / "none-seed0") is None
    process = start(*argv, "--no-tune", program=("-m", "ctxkern"))
    time.sleep(4)
    process.kill()
    process.communicate()
    assert "film" in finish(start(*argv, "--no-tune", program=("-m", "ctxkern")))
    assert read_result(folder / "film-seed0")["step"] == 400

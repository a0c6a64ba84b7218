"""`ctxkern sweep`: runs of one setting at several values, kept when done."""

import csv
import json
import signal

import pytest
from helpers.runs import TINY, error_of, failed, finish, start, wait_for_step, write

from ctxkern.cli import main
from ctxkern.experiments.multifile import sweep
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.sweep import AXES, plot

FLAGS = [*TINY, "--steps", "3", "--device", "cpu"]


@pytest.fixture
def corpus(tmp_path):
    """Two files each of two families."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("alpha_1", "alpha_2", "beta_1", "beta_2"):
        rows = (json.dumps({"input": f"{j}", "target": name[0] * 2}) + "\n" for j in range(12))
        write(folder, f"{name}.jsonl", "".join(rows))
    return folder


def read(place):
    with (place / "sweep.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_run_and_goes_on(corpus, tmp_path, capsys):
    place = tmp_path / "sweep"
    argv = ["sweep", "files", str(corpus), "--run-dir", str(place), *FLAGS]
    assert main([*argv, "--values", "2,4", "--workers", "2"]) == 0
    rows = read(place)
    assert [(row["value"], row["seed"], row["files_compared"], row["steps"]) for row in rows] == [
        ("2", "0", "2", "3"), ("4", "0", "2", "3"),
    ]  # fmt: skip
    result = json.loads((place / "runs" / "files-4-seed-0" / "result.json").read_text())
    shared = [result["best"][f"alpha_{i}.jsonl"] for i in (1, 2)]
    assert float(rows[1]["validation_loss"]) == pytest.approx(sum(shared) / 2)
    # two files are of one family, which is no purity
    assert rows[0]["purity"] == ""
    assert 0 <= float(rows[1]["purity"]) <= 1
    assert 50 < float(rows[1]["peak_mib"]) < 4096
    assert float(rows[1]["step_ms"]) > 0
    assert (place / "sweep.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "files        loss      purity" in out
    # a second call runs what is new
    before = (place / "runs" / "files-2-seed-0" / "result.json").stat().st_mtime_ns
    assert main([*argv, "--values", "2"]) == 0
    assert (place / "runs" / "files-2-seed-0" / "result.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert "holds a sweep with other settings" in failed(capsys, *argv, "--values", "2", "--lr", "0.1")


def test_what_does_not_fit_is_named(corpus, tmp_path, capsys):
    def words(what, *flags):
        return failed(capsys, "sweep", what, corpus, "--run-dir", tmp_path / "none", *flags)

    assert "--values has 'x'; it must be a number above 0" in words("lr", "--values", "1,x")
    assert "lr is 0.0; it must be a number above 0" in words("lr", "--values", "0")
    assert "--values has 9; it must be at most 4, the number of files" in words("files", "--values", "9")
    assert "--lr is given; it must be left to --values" in words("lr", "--lr", "1")
    assert "--seeds is 0; it must be at least 1" in words("lr", "--seeds", "0")
    assert "init is 'zero'; it must be one of" in words("init", "--values", "zero")
    assert not (tmp_path / "none").exists()
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    argv = ["sweep", "init", bad, "--values", "normal", "--run-dir", tmp_path / "bad", *FLAGS]
    assert "the run 'init-normal-seed-0' failed" in error_of(capsys, *argv)


def test_every_axis_has_values_that_fit():
    for axis in AXES.values():
        for value in axis.values:
            assert getattr(TrainConfig(**{axis.setting: value}), axis.setting) == value


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_goes_on(corpus, tmp_path, end):
    place = tmp_path / "sweep"
    run = place / "runs" / "init-normal-seed-0"
    argv = ["init", corpus, "--values", "normal", "--run-dir", place, *FLAGS, "--steps", "40"]
    argv += ["--checkpoint-every", "1"]
    program = ("-m", "ctxkern", "sweep")
    process = start(*argv, program=program)
    wait_for_step(process, run, 10)
    process.send_signal(end)
    out = finish(process, 130 if end == signal.SIGTERM else -end)
    assert end == signal.SIGKILL or "the same command goes on" in out
    if end == signal.SIGTERM:
        assert json.loads((run / "result.json").read_text())["step"] < 40
    finish(start(*argv, program=program))
    assert read(place)[0]["steps"] == "40"
    logged = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert logged == list(range(1, 41))


@pytest.mark.parametrize("what", ["files", "init"])
def test_plot_of_missing_numbers(tmp_path, what):
    values = (2, 4) if what == "files" else ("normal", "randn")
    rows = [
        {"value": value, "validation_loss": float("nan"), "purity": None, "purity_permuted": None}
        | {"step_ms": 3.0, "peak_mib": 400.0 + seed}
        for value in values
        for seed in (0, 1)
    ]
    plot(what, rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sweep._means(rows, "peak_mib")[values[0]] == [400.0, 401.0]

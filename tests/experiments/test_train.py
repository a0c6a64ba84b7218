import json
import math

import pytest
import torch

from ctxkern.experiments.core.plots import plot_losses, short_name, smooth
from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.compare import time_against_einsum
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.train import Evaluator, criterion, prepare, train
from ctxkern.testing.oracle import assert_same_bits


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture
def paths(tmp_path):
    out = []
    for i in range(3):
        out.append(tmp_path / f"f{i}.jsonl")
        rows = ({"input": f"{j} {i}", "target": "abc"[i] * (1 + j % 3)} for j in range(20 + 10 * i))
        out[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def tiny(**changes):
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context_dim": 4, "seq_len": 16, "batch_size": 4}
    return TrainConfig(
        **sizes | {"training_steps": 12, "dropout": 0.1, "checkpoint_every": 5, "device": "cpu"} | changes
    )


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"dtype": "float64"}, {"num_workers": 2}, {"balanced": True}]
)
def test_multifile_resume_ends_in_the_same_bits(tmp_path, paths, changes):
    config = tiny(**changes)
    whole = prepare(config, paths)
    result = train(whole, tmp_path / "whole", progress=False)
    assert result.step == 12
    assert set(result.first) == {"f0.jsonl", "f1.jsonl", "f2.jsonl"}
    parts = prepare(config, paths)
    loss, calls = parts.loss, iter(range(100))

    def stopping(model, batch):
        if next(calls) == 8:
            raise KilledError
        return loss(model, batch)

    parts.loss = stopping
    with pytest.raises(KilledError):
        train(parts, tmp_path / "parts", progress=False)
    parts = prepare(config, paths)
    train(parts, tmp_path / "parts", resume=True, progress=False)
    assert_same_bits(whole.model, parts.model)
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")


def test_workers_change_nothing(tmp_path, paths):
    jobs = [prepare(tiny(num_workers=workers), paths) for workers in (0, 2)]
    for i, job in enumerate(jobs):
        train(job, tmp_path / str(i), progress=False)
    assert_same_bits(jobs[0].model, jobs[1].model)


def test_training_lowers_the_loss_of_every_file(tmp_path, paths):
    job = prepare(tiny(training_steps=60, lr=1e-2, dropout=0.0), paths)
    result = train(job, tmp_path, progress=False)
    for name, before in result.first.items():
        assert result.last[name] < 0.5 * before


def test_evaluation_is_a_mean_over_labels_by_file(paths):
    job = prepare(tiny(val_fraction=0.3), paths)
    data, collator = job.validation_data, job.collator
    evaluate = Evaluator(data, collator, batch_size=4, max_windows=100)
    job.model.eval()
    losses = evaluate(job.model)
    for file_id, name in enumerate(data.file_names):
        batch = collator([item for item in data if item["file_id"] == file_id])
        expected = criterion(job.model(batch["input"], file_ids=batch["file_id"]), batch["target"])
        assert losses[name] == pytest.approx(expected.item(), rel=1e-5)
    few = Evaluator(data, collator, batch_size=4, max_windows=2)
    assert sum(len(batch["file_id"]) for batch in few.batches) == 6


def test_a_file_without_validation_is_nan(tmp_path, paths):
    single = tmp_path / "one.jsonl"
    single.write_text('{"input": "x", "target": "a"}\n')
    job = prepare(tiny(), [*paths, single])
    losses = job.evaluator()(job.model)
    assert math.isnan(losses["one.jsonl"])
    assert math.isfinite(losses["f0.jsonl"])


def test_small_data_shrinks_the_batch_and_num_files_limits_the_paths(paths):
    assert prepare(tiny(batch_size=1000), paths).sampler.batch_size == 18 + 27 + 36
    assert prepare(tiny(num_files=2), paths).dataset.num_files == 2
    with pytest.raises(ValueError, match="num_files: got 4, but 3 paths"):
        prepare(tiny(num_files=4), paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, takes at least 1"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"tokens": "words"}, "tokens: got 'words', takes one of"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"n_heads": 5}, "n_heads: got 5, takes a divisor of d_model"),
        ({"val_fraction": 1.0}, "val_fraction: got 1.0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_bad_presets_and_devices_are_named():
    with pytest.raises(ValueError, match="preset: got 'huge'"):
        TrainConfig.preset("huge")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: got '{device}'"):
            tiny(device=device).torch_device()


def test_the_einsum_step_starts_from_the_same_loss(paths):
    job = prepare(tiny(dropout=0.0), paths)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    times = time_against_einsum(job, steps=2)
    assert times.loss_difference < 1e-5
    assert times.ratio == times.einsum / times.fused > 0
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())


@pytest.mark.parametrize("files_count", [0, 1, 2, 27, 40])
def test_loss_plot_is_drawn(tmp_path, files_count):
    rows = [{"step": step, "loss": 4.0 / step} for step in range(1, 30)]
    for step in (0, 15, 29) if files_count else ():
        by_file = {f"task_{i}.json": 4 - 0.1 * step + 0.01 * i for i in range(files_count)}
        by_file["task_0.json"] = None if files_count > 1 else 1.0
        known = [loss for loss in by_file.values() if loss is not None]
        rows.append({"step": step, "mean": sum(known) / len(known), "validation": by_file})
    plot_losses(rows, tmp_path / "loss.png", title="title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_helpers():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([0.0, 1.0], 0.0) == [0.0, 1.0]
    assert short_name("folder/a_long_file_name.json", 12) == "folde…e_name"
    assert short_name("plain.txt", 12) == "plain"

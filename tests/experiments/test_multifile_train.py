import math

import pytest
import torch
from helpers.runs import KilledError, stop_at, tiny

from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.compare import time_against_einsum
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.train import Evaluator, criterion, prepare, train
from ctxkern.testing.oracle import assert_same_bits


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
    parts.loss = stop_at(parts.loss, 8)
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
    with pytest.raises(ValueError, match="num_files is 4; it must be at most 3"):
        prepare(tiny(num_files=4), paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be an integer of at least 1"),
        ({"lr": -1.0}, "lr is -1.0; it must be a number above 0"),
        ({"tokens": "words"}, "tokens is 'words'; it must be one of chars, bytes"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of"),
        ({"n_heads": 5}, "n_heads is 5; it must be a divisor of d_model = 16"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it must be a number of at least 0 and below 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_bad_presets_and_devices_are_named():
    with pytest.raises(ValueError, match="preset is 'huge'; it must be one of debug"):
        TrainConfig.preset("huge")
    for device in ("gpu", "cuda:99", "meta", "abacus:0", ""):
        with pytest.raises(ValueError, match=f"device is '{device}', which torch cannot use here"):
            tiny(device=device).torch_device()


def test_the_einsum_step_starts_from_the_same_loss(paths):
    job = prepare(tiny(dropout=0.0), paths)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    times = time_against_einsum(job, steps=2)
    assert times.loss_difference < 1e-5
    assert times.ratio == times.einsum / times.fused > 0
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())

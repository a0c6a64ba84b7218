import json
import math

import pytest
import torch
from helpers.runs import KilledError, stop_at, tiny

from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.costs import step_costs, without_context
from ctxkern.experiments.multifile.train import Evaluator, criterion, majority_shares, prepare, train
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
    costs = step_costs(job, steps=2)
    assert costs.loss_difference < 1e-5
    assert list(costs.seconds) == list(costs.peak_bytes) == ["no context", "ctxkern", "einsum"]
    assert all(seconds > 0 for seconds in costs.seconds.values())
    assert costs.peak_bytes["einsum"] > costs.peak_bytes["no context"] > 0
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())


def test_a_model_without_context_is_the_base_alone(paths):
    job = prepare(tiny(dropout=0.0), paths)
    plain, batch = without_context(job.model), job.batch_at(0)
    assert not any("bilinear" in name for name, _ in plain.named_parameters())
    zeros = torch.zeros(len(batch["input"]), job.config.context_dim)
    torch.testing.assert_close(plain(batch["input"]), job.model(batch["input"], zeros))
    job.loss(plain, batch).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in plain.blocks[0].attention.parameters())


def test_answers_are_counted_beside_the_majority(tmp_path):
    lines = [json.dumps({"input": f"{i:02}?", "target": "yes" if i % 3 else "no"}) for i in range(30)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines))
    text = tmp_path / "text.txt"
    text.write_text("no answers here\n" * 40)
    job = prepare(tiny(val_fraction=0.3, eval_windows=9), [path, text])
    held = [job.dataset.data[i]["target"] for i in job.dataset.indices("validation") if job.dataset.file_ids[i] == 0]
    shares = majority_shares(job.dataset)
    assert shares["answers.jsonl"] == held.count("yes") / len(held)
    assert math.isnan(shares["text.txt"])
    evaluate = job.evaluator()
    evaluate(job.model)
    assert job.observe(job.model)["exact_match/answers.jsonl"] == 0
    # a head that says what each answer needs, whatever is asked
    wanted = job.tokenizer.encode("yes") + [job.tokenizer.eos_id]

    def says_yes(inputs, file_ids=None):
        logits = torch.zeros(*inputs.shape, job.tokenizer.vocab_size)
        for row, ids in enumerate(inputs.tolist()):
            # windows of a text need not begin where it does
            start = ids.index(job.tokenizer.sep_id) if job.tokenizer.sep_id in ids else 0
            for i, token in enumerate(wanted):
                if start + i < len(ids):
                    logits[row, start + i, token] = 9.0
        return logits

    says_yes.token_embeddings = job.model.token_embeddings
    job.last_evaluator(says_yes)
    assert job.last_evaluator.exact["answers.jsonl"] == shares["answers.jsonl"]
    assert math.isnan(job.last_evaluator.exact["text.txt"])

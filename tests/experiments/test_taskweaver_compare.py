"""`ctxkern taskweaver compare`: adapters of as many parameters, few shots, and differences paired by dataset."""

import contextlib
import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.runs import failed, finish, start, wait_for_step

from ctxkern.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from helpers.language import save_model, write_task  # noqa: E402

import ctxkern  # noqa: E402
from ctxkern.experiments.core.runs import PLAN  # noqa: E402
from ctxkern.experiments.taskweaver.adapters import attach_bank, equal_rank  # noqa: E402
from ctxkern.experiments.taskweaver.comparison.results import summarise, table  # noqa: E402
from ctxkern.experiments.taskweaver.config import TaskWeaverSettings  # noqa: E402
from ctxkern.experiments.taskweaver.data import TaskDataset  # noqa: E402
from ctxkern.experiments.taskweaver.evaluation import evaluate, few_shot_arm, spread  # noqa: E402
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver, TaskWeaverConfig, parameter_counts  # noqa: E402
from ctxkern.experiments.taskweaver.measure import TrainedModel, mean_loss, score  # noqa: E402
from ctxkern.experiments.taskweaver.training import TaskWeaverJob  # noqa: E402

TARGETS = "q_proj,v_proj"
SIZES = f"--hidden_dim=8 --lora_target_layers={TARGETS} --batch_size=4 --device=cpu --steps=4 --warmup-steps=2".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Files that list two datasets to train on, and one that is held out."""
    folder = tmp_path_factory.mktemp("data")
    paths = []
    for name, shifts in (("tasks", (1, 2)), ("others", (3,))):
        entries = [
            {"name": "pairs", "dataset_path": str(write_task(folder / f"{name}{shift}.jsonl", shift))}
            for shift in shifts
        ]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(entries))
    return paths


def command(run_dir, model, configs, *more):
    where = ("--model_name", model, "--dataset_config", configs[0], "--held_out_config", configs[1])
    return [str(arg) for arg in ("taskweaver", "compare", "--run-dir", run_dir, *where, *SIZES, *more)]


def job_of(model, configs, **changes):
    sizes = {"hidden_dim": 8, "lora_target_layers": TARGETS, "batch_size": 4, "device": "cpu", "learning_rate": 0.01}
    return TaskWeaverJob(TaskWeaverSettings(model_name=str(model), dataset_config=str(configs[0]), **sizes | changes))


@pytest.mark.parametrize("count", [1, 3])
def test_adapters_have_as_many_parameters_as_the_hypernetwork(model, count):
    config = TaskWeaverConfig(hidden_dim=64, lora_target_layers=TARGETS, lora_rank=4)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)
    rank = equal_rank(lm, config, count)
    assert not hasattr(lm.model.layers[0].self_attn.q_proj, "attached")
    bank = attach_bank(lm, count, 0, config)
    assert (bank.count, bank.rank, len(bank.targets)) == (count, rank, 4)
    own = parameter_counts(lm)["trainable"]
    ctxkern.detach(lm)
    wanted = parameter_counts(TaskWeaver(lm, config))["trainable"]
    # nearer with one rank more or less it is not
    assert abs(own - wanted) <= own / rank / 2


@pytest.mark.parametrize("weights", ["shared", "dataset"])
def test_adapters_are_those_of_the_dataset(model, configs, weights):
    job = job_of(model, configs, weights=weights, adapter_rank=3)
    batch = job.batch(job.train[:2] + job.train[-2:])
    assert batch["file_id"].unique().tolist() == [0, 1]
    assert torch.equal(batch["source"], batch["file_id"] if weights == "dataset" else torch.zeros(4, dtype=torch.int64))
    base = mean_loss(job.model, {**batch, "source": None})
    assert torch.equal(mean_loss(job.model, batch), base)
    loss = job.loss(job.model, job.batch(job.train[:3]))
    loss.backward()
    layer = job.model.lm.model.layers[0].self_attn.q_proj
    moved = layer.lora_B.grad.flatten(1).any(1).tolist()
    assert moved == ([True, False] if weights == "dataset" else [True])
    assert layer.weight.grad is None
    # the frozen model is not in a checkpoint
    assert job.model.state_dict().keys() == {
        f"lm.model.layers.{i}.self_attn.{name}.{part}"
        for i in range(2)
        for name in TARGETS.split(",")
        for part in ("lora_A", "lora_B")
    }


def test_long_examples_are_last_and_padding_is_left_out(model, configs):
    job = job_of(model, configs)
    batch = job.batch(job.train[:8])
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(lengths, lengths.sort().values)
    short = {name: t[:2] for name, t in batch.items()}
    whole = job.batch([i for i in job.train[:8] if job.dataset.length(i) in lengths[:2].tolist()][:2])
    assert whole["input_ids"].shape[1] < short["input_ids"].shape[1]
    seen = []
    job.model.lm.register_forward_pre_hook(lambda *call: seen.append(call[-1]["input_ids"].shape[1]), with_kwargs=True)
    mean_loss(job.model, short)
    # the last token predicts nothing
    assert seen == [int(lengths[1]) - 1]


def dataset_of(rows):
    """A dataset whose examples have a prompt of a token."""
    dataset = TaskDataset()
    for name, own in rows.items():
        labels = [[-100, *row[1:]] for row in own]
        dataset.add(name, {"input_ids": own, "labels": labels, "prompt_lengths": [1] * len(own)})
    return dataset


class Counting(torch.nn.Module):
    """A language model whose likeliest token is the one after the last, by number."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        class Out:
            logits = 9.0 * torch.nn.functional.one_hot((input_ids + 1) % 12, 12).float()[:, logits_to_keep]

        return Out


class Counted(TrainedModel):
    def __init__(self):
        super().__init__(Counting())

    using = staticmethod(contextlib.nullcontext)


class Words:
    eos_token_id, pad_token_id, bos_token_id = 0, 11, None

    @staticmethod
    def encode(text, add_special_tokens):
        return [10]


def test_matches_by_likeliest_tokens():
    dataset = dataset_of({"a": [[3, 4, 5], [3, 4, 6], [7, 8]], "b": [[1, 5]]})
    arm = few_shot_arm(Counted(), Words, dataset, [], 0, 0)
    chosen = spread(dataset, range(4), 3)
    assert chosen == [0, 1, 2, 3]
    rows = evaluate([arm], Words, dataset, chosen, batch_size=2, max_new_tokens=0)
    assert [(row["dataset"], row["examples"]) for row in rows] == [("a", 3), ("b", 1)]
    assert [row["exact_match"] for row in rows] == [2 / 3, 0.0]
    assert [row["token_accuracy"] for row in rows] == [4 / 5, 0.0]
    # of a, the answers 4 5 and 8 are as frequent as 4 6; of the second alone it is the only one
    assert [row["majority"] for row in rows] == [1 / 3, 1.0]
    (row,) = evaluate([arm], Words, dataset, [0, 2], batch_size=2, max_new_tokens=0, known=[1])
    assert row["majority"] == 0.0
    row = {"input_ids": [[3, 4]], "attention_mask": [[1, 1]], "labels": [[-100, 4]]}
    found = score(arm.model, {name: torch.tensor(value) for name, value in row.items()})
    assert (found.exact, found.right, found.labels) == (1, 1, 1)


def test_shots_are_of_the_dataset_and_not_the_example(model):
    dataset = dataset_of({"a": [[1, 2, 0], [3, 4, 0], [5, 6]], "b": [[7, 8, 0]]})
    arm = few_shot_arm(Counted(), Words, dataset, range(4), 2, 0)
    # the end of text is left out, a gap follows each
    assert sorted(map(tuple, arm.shots(0).view(2, 3).tolist())) == [(3, 4, 10), (5, 6, 10)]
    assert arm.shots(3).numel() == 0
    few = few_shot_arm(Counted(), Words, dataset, [1], 2, 0)
    assert few.shots(0).tolist() == [3, 4, 10]
    assert few.name == "2-shot"


def row(weights, dataset, seed, loss, group="trained"):
    more = {"token_accuracy": loss / 10, "exact_match": 0.5, "majority": 0.25}
    return {"group": group, "weights": weights, "dataset": dataset, "seed": seed, "loss": loss, **more}


def test_differences_are_paired_with_weights_of_the_prompt():
    rows = [row("aligned", "a", 0, 1.0), row("aligned", "a", 1, 3.0), row("aligned", "b", 0, 5.0)]
    rows += [row("aligned", "b", 1, 5.0), row("base", "a", 0, 2.0), row("base", "a", 1, 4.0)]
    rows += [row("base", "b", 0, 4.5), row("base", "b", 1, 4.5), row("aligned", "c", 0, 2.0, "held out")]
    first, second, third = summarise(rows)
    assert (first.arm, first.delta, first.worse, first.loss) == ("aligned", 0.0, 0, 3.5)
    assert (second.arm, second.loss, second.delta, second.worse, second.datasets) == ("base", 3.75, 0.25, 1, 2)
    assert second.by_dataset == {"a": 1.0, "b": -0.5}
    assert second.low == -0.5
    assert second.high == 1.0
    assert (third.group, third.datasets, third.exact_match) == ("held out", 1, 0.5)
    assert "held out, 1" in table([first, second, third])


def test_compare(model, configs, tmp_path, capsys):
    run_dir = tmp_path / "runs"
    more = (
        "--seeds=1",
        "--shots=2",
        "--examples=4",
        "--max_new_tokens=0",
        "--rates=0.01,0.001",
        "--adapter-rates=0.02",
        "--tune_steps=1",
    )
    argv = command(run_dir, model, configs, *more)
    assert main(argv) == 0
    out = capsys.readouterr().out
    with (run_dir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    prompt, adapters = ["aligned", "shuffled", "blank", "base", "2-shot"], ["shared adapter", "adapter a dataset"]
    for group, datasets, arms in (
        ("trained", 2, [*prompt, *adapters]),
        ("held out", 1, [*prompt, "shared adapter"]),
    ):
        of_group = [one for one in rows if one["group"] == group]
        assert sorted(one["weights"] for one in of_group) == sorted(arms * datasets)
    assert all(arm in out for arm in (*prompt, *adapters))
    assert (run_dir / "compare.png").stat().st_size > 0
    reported = {name for name in json.loads((run_dir / PLAN).read_text()) if not name.startswith("tune")}
    assert reported == {"dataset-seed0", "prompt-seed0", "shared-seed0"}
    assert {path.name for path in run_dir.glob("tune-*")} == {"tune-prompt-0.01", "tune-prompt-0.001"}
    with (run_dir / "runs.csv").open() as file:
        rates = {one["weights"]: float(one["learning_rate"]) for one in csv.DictReader(file)}
    assert rates["shared"] == rates["dataset"] == 0.02
    losses = {
        rate: json.loads((run_dir / f"tune-prompt-{rate}" / "result.json").read_text())["last"]
        for rate in (0.01, 0.001)
    }
    assert rates["prompt"] == min(losses, key=lambda rate: sum(losses[rate].values()))
    # a held-out file that has changed is measured again
    (entry,) = json.loads(configs[1].read_text())
    held_out, before = Path(entry["dataset_path"]), Path(entry["dataset_path"]).read_text()
    held_out.write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert main(argv) == 0
    assert len(list(run_dir.glob("prompt-seed0/evaluation-*.json"))) == 2
    held_out.write_text(before)
    capsys.readouterr()
    # again: nothing is run, nothing is measured
    for path in run_dir.glob("*-seed0/model/*.safetensors"):
        path.unlink()
    assert main(argv) == 0
    assert capsys.readouterr().out == out
    assert "'tune-prompt-0.01' with other settings" in failed(capsys, *argv, "--lora_rank", 4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--weights", "shared"), "--weights is given; it must be left to the comparison"),
        (("--learning_rate", "0.1"), "--learning_rate is given; it must be left to the comparison"),
        (("--rates", "0.1,x"), "--rates has 'x'; it must have numbers above 0, with commas between"),
        (("--rates", ""), "--rates is empty; it must have at least one number"),
        (("--adapter_rates", "-1"), "--adapter_rates has '-1'; it must have numbers above 0, with commas between"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--val_fraction", "0"), "--val_fraction is 0; it must be above 0"),
        (("--max_new_tokens", "-1"), "--max_new_tokens is -1; it must be at least 0"),
    ],
)
def test_errors(model, configs, tmp_path, capsys, more, said):
    assert said in failed(capsys, *command(tmp_path / "runs", model, configs, *more))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(model, configs, tmp_path):
    run_dir = tmp_path / "runs"
    argv = command(run_dir, model, configs, "--seeds=1", "--examples=4", "--max_new_tokens=0", "--steps=30")
    process = start(*argv, program=("-m", "ctxkern"))
    wait_for_step(process, run_dir / "shared-seed0", 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "results.csv").exists()
    finish(start(*argv, program=("-m", "ctxkern")))
    assert (run_dir / "results.csv").exists()

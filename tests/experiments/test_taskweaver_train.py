"""`ctxkern taskweaver`: training on several datasets, resumed runs, and what a trained model does."""

import contextlib
import csv
import json
import math
import os
import signal

import pytest
import torch
from helpers.runs import KilledError, error_of, failed, finish, start, stop_at, wait_for_step
from safetensors.torch import load_file

from ctxkern.cli import build_parser, main
from ctxkern.experiments.core.checkpoint import read_step
from ctxkern.experiments.core.runlog import read_metrics

pytest.importorskip("transformers", reason="transformers is not installed")
from helpers.language import save_model, write_task  # noqa: E402

from ctxkern.experiments.taskweaver import TaskWeaver, measure  # noqa: E402
from ctxkern.experiments.taskweaver.config import WEIGHTS, TaskWeaverSettings  # noqa: E402
from ctxkern.experiments.taskweaver.evaluation import shuffled  # noqa: E402
from ctxkern.experiments.taskweaver.training import TaskWeaverJob  # noqa: E402

# every flag of the document, and those that the project adds
DOCUMENTED = (
    "model_name hidden_dim lora_rank lora_alpha lora_target_layers batch_size learning_rate num_epochs output_dir "
    "tensorboard_dir dataset_config use_default_dataset lora_dropout fp16 bf16 gradient_accumulation_steps "
    "logging_steps save_steps device resume"
).split()
TARGETS = "q_proj,v_proj"
SIZES = f"--hidden_dim 8 --lora_target_layers {TARGETS} --batch_size 4 --learning_rate 0.01 --device cpu".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    entries = [
        {"name": "pairs", "dataset_path": str(write_task(folder / f"{name}.jsonl", shift))}
        for shift, name in enumerate("ab", 1)
    ]
    (folder / "tasks.json").write_text(json.dumps(entries, indent=1).replace("[", "[ // two", 1))
    return folder / "tasks.json"


def flags(run_dir, model, config, *more, steps=12):
    given = ["--model_name", model, "--dataset_config", config, "--output_dir", run_dir, "--warmup_steps", 2]
    return [*given, *SIZES, "--quiet", *(["--steps", steps] if steps else []), *more]


def train(*args, **how):
    assert main(["taskweaver", "train", *map(str, flags(*args, **how))]) == 0
    return args[0]


@pytest.fixture(scope="module")
def trained(model, config, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "whole", model, config, "--lora_dropout", 0.1, steps=40)


def settings(model, config, **changes):
    base = {"hidden_dim": 8, "lora_target_layers": TARGETS, "batch_size": 4, "device": "cpu"}
    return TaskWeaverSettings(model_name=str(model), dataset_config=str(config), **base | changes)


def job_of(model, config, **changes):
    return TaskWeaverJob(settings(model, config, **changes))


def same(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_every_flag_of_the_document_is_there():
    for name in DOCUMENTED:
        for form in {name, name.replace("_", "-")}:
            value = [] if name in ("use_default_dataset", "fp16", "bf16", "resume") else ["1"]
            args = build_parser().parse_args(["taskweaver", "train", f"--{form}", *value])
            # a flag that was not given leaves no attribute, or None
            assert any(str(v) in ("1", "1.0", "True") for k, v in vars(args).items() if k != "experiment"), form


def test_a_run_learns_and_leaves_a_model(trained, model, config):
    rows = read_metrics(trained)
    validation = [row for row in rows if "validation" in row]
    assert set(validation[0]["validation"]) == {"pairs/a", "pairs/b"}
    assert all(validation[-1]["validation"][name] < loss for name, loss in validation[0]["validation"].items())
    assert set(validation[0]["observed"]) == {"token_accuracy/pairs/a", "token_accuracy/pairs/b"}
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-8:]) < sum(losses[:8])
    result = json.loads((trained / "result.json").read_text())
    assert result["details"]["token_accuracy"].keys() == {"pairs/a", "pairs/b"}
    assert (trained / "loss.png").stat().st_size > 0
    assert list((trained / "logs").iterdir())
    kept = load_file(trained / "model" / "model.safetensors")
    last = {k.removeprefix("model.weaver."): t for k, t in load_file(trained / "last.safetensors").items()}
    # the frozen model is in neither
    assert not any("lm." in name for name in (*kept, *last))
    assert all(torch.equal(t, last[name]) for name, t in kept.items())
    assert (trained / "model" / "tokenizer.json").exists()
    assert TaskWeaver.from_pretrained(trained / "model").config.model_name == str(model)


def test_step_0_has_the_loss_of_the_language_model(model, config):
    job = job_of(model, config)
    batch = job.batch(job.train[:4])
    base = measure.mean_loss(job.model, {**batch, "source": None})
    theirs = job.model.weaver.lm  # transformers' own loss needs the layers to be in use
    import ctxkern

    with ctxkern.use(theirs):
        want = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(base, want)
    assert torch.equal(measure.mean_loss(job.model, batch), base)
    assert math.isclose(measure.score(job.model, batch).loss / measure.count_labels(batch), float(want), rel_tol=1e-5)


def test_prompts_are_read_once(model, config):
    job = job_of(model, config)
    ids = [i for i in job.train if i % 2][:6]
    first = job.batch(ids)["source"]
    computed = job.embeddings.computed
    assert computed == len({tuple(job.dataset.prompt(i).tolist()) for i in ids})
    assert torch.equal(job.embeddings([job.dataset.prompt(i) for i in sorted(ids, key=job.dataset.length)]), first)
    assert torch.equal(job.batch(ids[::-1])["source"].sort(0).values, first.sort(0).values)
    assert job.embeddings.computed == computed
    # as the model computes them itself
    batch = job.batch(ids)
    own = job.model.weaver.embed(batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"])
    torch.testing.assert_close(own, batch["source"])
    bounded = job_of(model, config, cached_prompts=2)
    assert torch.equal(bounded.batch(ids)["source"], first)
    assert len(bounded.embeddings._kept) == 2


def test_the_optimizer_has_the_hypernetwork_alone(model, config):
    job = job_of(model, config)
    own = {id(p) for module in job.model.weaver.hypernetwork().values() for p in module.parameters()}
    assert {id(p) for group in job.optimizer.param_groups for p in group["params"]} == own


def test_epochs_say_how_many_steps(model, config, tmp_path):
    run_dir = train(tmp_path / "run", model, config, "--num_epochs", 2, steps=None)
    assert json.loads((run_dir / "result.json").read_text())["step"] == 2 * (44 // 4)


def test_flags_have_their_effect(model, config, tmp_path):
    plain = train(tmp_path / "plain", model, config, steps=3)
    rows = [row["loss"] for row in read_metrics(plain) if "loss" in row]

    def losses(name, *more):
        run_dir = train(tmp_path / name, model, config, *more, steps=3)
        return run_dir, [row["loss"] for row in read_metrics(run_dir) if "loss" in row]

    _, parts = losses("parts", "--gradient_accumulation_steps", 2)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(rows))
    _, dropped = losses("dropped", "--lora-dropout", 0.5)
    # B is zero at the first step
    assert dropped[0] == rows[0]
    assert dropped[2] != rows[2]
    board = tmp_path / "board"
    moved, _ = losses("moved", "--tensorboard_dir", board)
    assert list(board.glob("events*"))
    assert not (moved / "logs").exists()


def killed(run_dir, model, config, monkeypatch, *more, at):
    """A run that was killed in the step after `at` steps."""
    plain = TaskWeaverJob.loss
    calls = stop_at(lambda job, pair: plain(job, *pair), at)
    with monkeypatch.context() as patch:
        patch.setattr(TaskWeaverJob, "loss", lambda job, model, batch: calls(job, (model, batch)))
        with pytest.raises(KilledError):
            train(run_dir, model, config, *more, steps=40)
    return run_dir


def test_logs_and_checkpoints_are_written_as_often_as_asked(model, config, tmp_path, monkeypatch):
    often = ("--eval_every", 40, "--logging_steps", 5, "--save_steps", 3)
    run_dir = killed(tmp_path / "run", model, config, monkeypatch, *often, at=8)
    assert read_step(run_dir / "last.safetensors") == 6
    # a checkpoint writes the logs too
    assert read_metrics(run_dir)[-1]["step"] == 6
    run_dir = killed(tmp_path / "other", model, config, monkeypatch, *often[:-1], 40, at=8)
    assert read_metrics(run_dir)[-1]["step"] == 5
    assert not (run_dir / "last.safetensors").exists()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(model, config, name, dtype, weights):
    """Losses and gradients are those of float32, up to the roundings of a value in each of the model's products."""
    found = {}
    for given in ({}, {name: True}):
        job = job_of(model, config, weights=weights, **given)
        with torch.no_grad():
            for parameter in job.model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        job.model.train()
        loss = job.loss(job.model, job.batch(job.train[:4]))
        loss.backward()
        parameters = [p for p in job.model.parameters() if p.requires_grad]
        found[bool(given)] = loss.detach(), torch.cat([p.grad.flatten() for p in parameters])
        assert all(p.dtype is torch.float32 for p in parameters)
    (loss, grad), (half_loss, half_grad) = found[False], found[True]
    assert half_loss.dtype is torch.float32
    assert loss != half_loss
    assert abs(loss - half_loss) < 32 * torch.finfo(dtype).eps * abs(loss)
    assert (grad - half_grad).norm() < 32 * torch.finfo(dtype).eps * grad.norm()


def test_a_kill_and_a_resume_end_in_the_same_bits(trained, model, config, tmp_path, monkeypatch):
    often = ("--lora_dropout", 0.1, "--save_steps", 5)
    run_dir = killed(tmp_path / "parts", model, config, monkeypatch, *often, at=17)
    assert not (run_dir / "model").exists()
    assert main(["taskweaver", "train", "--resume", "--output_dir", str(run_dir), "--quiet"]) == 0
    assert same(run_dir / "last.safetensors", trained / "last.safetensors")
    assert same(run_dir / "model" / "model.safetensors", trained / "model" / "model.safetensors")
    assert [row["step"] for row in read_metrics(run_dir)] == [row["step"] for row in read_metrics(trained)]


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on(trained, model, config, tmp_path):
    run_dir = tmp_path / "run"
    argv = flags(run_dir, model, config, "--lora_dropout", 0.1, "--save_steps", 3, "--logging_steps", 1, steps=40)
    process = start("taskweaver", "train", *argv, program=("-m", "ctxkern"))
    wait_for_step(process, run_dir, 11)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (run_dir / "last.safetensors").exists()
    finish(start("taskweaver", "train", "--resume", "--output_dir", run_dir, program=("-m", "ctxkern")))
    assert same(run_dir / "model" / "model.safetensors", trained / "model" / "model.safetensors")


def test_data_that_changed_is_not_gone_on_with(model, config, tmp_path, capsys):
    data = write_task(tmp_path / "a.jsonl", 1)
    own = tmp_path / "own.json"
    own.write_text(json.dumps([{"name": "pairs", "dataset_path": str(data)}]))
    run_dir = train(tmp_path / "run", model, own, steps=2)
    write_task(data, 2)
    capsys.readouterr()
    resume = ("taskweaver", "train", "--resume", "--output_dir", run_dir)
    assert "a.jsonl has changed since the run in" in failed(capsys, *resume)
    data.unlink()
    assert "a.jsonl is gone; the run in" in failed(capsys, *resume)
    assert "--num_epochs is 9; it must be 3, as in the run" in failed(capsys, *resume, "--num_epochs", 9)


def test_the_default_dataset(model, tmp_path, config):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = settings(model, "", use_default_dataset=True, dataset_path=str(tmp_path))
    assert [c.name for c in given.datasets()] == ["gsm8k"]
    assert len(TaskWeaverJob(given).dataset) == 8
    (hub,) = settings(model, "", use_default_dataset=True).datasets()
    assert (hub.dataset_path, hub.dataset_config) == ("openai/gsm8k", "main")


def test_errors_of_settings(model, config, tmp_path, capsys):
    def fails(*more, given=config):
        return error_of(capsys, "taskweaver", "train", *flags(tmp_path / "run", model, given, *more)).splitlines()[-1]

    assert "dataset_config and use_default_dataset: neither is given" in fails(given="")
    assert "dataset_config and use_default_dataset: both are given" in fails("--use_default_dataset")
    assert "dataset_path is given without use_default_dataset" in fails("--dataset_path", "x")
    assert "fp16 and bf16 are both given" in fails("--fp16", "--bf16")
    assert "lora_dropout is 1.0; it must be a number of at least 0 and below 1" in fails("--lora_dropout", 1)
    assert "targets has 'nothing', which means no layer" in fails("--lora_target_layers", "nothing")
    assert "No such file" in fails(given=tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('[\n{"name": "other", "dataset_path": "x"}]')
    assert "bad.json: line 2, entry 1: name is 'other'; it must be a processor" in fails(given=tmp_path / "bad.json")
    assert not (tmp_path / "run").exists()


def test_generate(trained, capsys):
    def said(*more):
        assert main(["taskweaver", "generate", str(trained), "--max_new_tokens", "6", "--device", "cpu", *more]) == 0
        return capsys.readouterr().out

    weaver = TaskWeaver.from_pretrained(trained / "model")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(weaver.config.model_name)
    ids = tokenizer("abc\n", return_tensors="pt")["input_ids"]
    want = weaver.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert said("--prompt", "abc\n") == tokenizer.decode(want, skip_special_tokens=True).strip("\n") + "\n"
    two = said("--prompt", "abc", "--prompt", "de", "--temperature", "0.9", "--num_return_sequences", "2")
    assert two.count("abc\n") >= 2
    assert two == said("--prompt", "abc", "--prompt", "de", "--temperature", "0.9", "--num_return_sequences", "2")
    argv = ("taskweaver", "generate", trained, "--prompt", "a")
    assert "--max_new_tokens is 0; it must be at least 1" in failed(capsys, *argv, "--max_new_tokens", 0)
    assert "--num_return_sequences is 2; it must be at most --num_beams" in failed(
        capsys, *argv, "--num_return_sequences", 2
    )
    assert "it must have some text" in error_of(capsys, "taskweaver", "generate", trained, "--prompt", "")
    assert "has no config.json; it must be a folder of save_pretrained" in failed(
        capsys, "taskweaver", "generate", trained / "absent", "--prompt", "a"
    )


def test_export(trained, tmp_path, capsys):
    assert main(["taskweaver", "export", str(trained), "--prompt", "abc", "--out", str(tmp_path / "x")]) == 0
    weaver = TaskWeaver.from_pretrained(trained / "model")
    ids = torch.tensor([[weaver.lm.config.vocab_size - 1]])
    weaver.export(ids, tmp_path / "other")
    found, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("x", "other"))
    assert found.keys() == other.keys()
    assert not any(torch.equal(t, other[name]) for name, t in found.items())


def test_evaluate(trained, config, tmp_path, capsys):
    out = tmp_path / "table.csv"
    argv = ["taskweaver", "evaluate", trained, "--dataset_config", config, "--examples", 6, "--out", out, "--quiet"]
    assert main(list(map(str, argv))) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["dataset"], row["weights"]) for row in rows] == [
        (name, arm) for name in ("pairs/a", "pairs/b") for arm in ("aligned", "shuffled", "blank", "base")
    ]
    assert {row["examples"] for row in rows} == {"6"}
    losses = [float(row["loss"]) for row in rows]
    assert len(set(losses)) == 8
    # what was learnt is in the weights
    assert losses[0] < losses[3]
    assert losses[4] < losses[7]
    assert "token accuracy" in capsys.readouterr().out
    weaver = TaskWeaver.from_pretrained(trained / "model")
    import transformers

    from ctxkern.experiments.taskweaver.data import create_dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(weaver.config.model_name)
    dataset = create_dataset(config, tokenizer)
    own = [i * 24 // 6 for i in range(6)]
    for arm, prompt in (("aligned", dataset.prompt), ("blank", lambda i: torch.tensor([tokenizer.eos_token_id]))):
        loss, labels = 0.0, 0
        for i in own:
            item, ids = dataset[i], dataset[i]["input_ids"].long()[None]
            out_ = weaver(ids, labels=item["labels"].long()[None], embeddings=weaver.embed(prompt(i).long()[None]))
            count = ids.shape[1] - item["prompt_length"]
            loss, labels = loss + float(out_.loss.detach()) * count, labels + count
        row = next(row for row in rows if (row["dataset"], row["weights"]) == ("pairs/a", arm))
        torch.testing.assert_close(float(row["loss"]), loss / labels, rtol=1e-5, atol=0)
    other = shuffled(dataset, range(len(dataset)), seed=0)
    assert all(dataset.file_ids[i] != dataset.file_ids[j] for i, j in other.items())
    capsys.readouterr()
    bad = ("taskweaver", "evaluate", trained, "--dataset_config", config)
    assert "--out is" in failed(capsys, *bad, "--out", tmp_path / "absent" / "x.csv")
    assert "--examples is 0; it must be at least 1" in failed(capsys, *bad, "--examples", 0)
    (tmp_path / "bad.json").write_text("[]")
    assert "must hold a list of objects" in failed(capsys, *bad[:-1], tmp_path / "bad.json")


@pytest.mark.parametrize(("answer", "right"), [(str.strip, 2), (lambda text: text[:1], 3)])
def test_exact_match_counts_answers(answer, right):
    """A language model that has one answer gives it to those examples that want it, or that part of it."""
    from ctxkern.experiments.taskweaver import evaluation

    class Fixed:
        using = staticmethod(contextlib.nullcontext)

        class lm:  # noqa: N801
            device = torch.device("cpu")

            @staticmethod
            def generate(input_ids, **how):
                return torch.cat([input_ids, torch.tensor([[5, 6, 0, 9]] * len(input_ids))], 1)

    class Words:
        eos_token_id, pad_token_id = 0, 1

        @staticmethod
        def decode(ids, **how):
            return " ".join(map(str, ids))

    rows = [[7, 5, 6, 0], [7, 7, 5, 6, 0], [7, 5, 0], [7, 6, 6, 8, 0]]
    lengths = [1, 2, 1, 1]
    items = [
        {"input_ids": torch.tensor(row), "labels": torch.tensor(row), "prompt_length": n, "file_id": 0}
        for row, n in zip(rows, lengths, strict=True)
    ]
    assert evaluation._exact(Fixed, Words, items, None, None, answer) == right


def test_the_majority_is_one_of_answers(trained, tmp_path):
    """Six solutions of one answer are right for all; as completions they are six."""
    import transformers

    from ctxkern.experiments.taskweaver.data import create_dataset
    from ctxkern.experiments.taskweaver.evaluation import evaluate, prompt_arms

    weaver = TaskWeaver.from_pretrained(trained / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(weaver.config.model_name)
    rows = [{"question": f"q {i}", "answer": f"as {i} is so\n#### 7"} for i in range(6)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = create_dataset([{"name": "gsm8k", "dataset_path": str(tmp_path / "gsm8k.jsonl")}], tokenizer)
    arms = prompt_arms(weaver, tokenizer, dataset, range(6), 0)[:1]
    for max_new_tokens, share in ((2, 1.0), (0, 1 / 6)):
        (row,) = evaluate(arms, tokenizer, dataset, range(6), batch_size=6, max_new_tokens=max_new_tokens)
        assert row["majority"] == share

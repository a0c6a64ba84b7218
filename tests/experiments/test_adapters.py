"""`ctxkern adapters`: a bank trained in mixed batches, each adapter as it would alone; added, retired, resumed."""

import json
import math
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.runs import SHARDED, KilledError, error_of, failed, finish, start, stop_at, wait_for_step
from safetensors.torch import load_file

import ctxkern
from ctxkern.cli import main
from ctxkern.experiments.adapters import requests
from ctxkern.experiments.adapters.roster import Roster
from ctxkern.experiments.adapters.train import AdapterJob
from ctxkern.experiments.core.runlog import read_metrics

pytest.importorskip("transformers", reason="transformers is not installed")
from helpers.language import save_model, write_task  # noqa: E402

NAMES = ("away", "beyond", "closer")
OWN = {"beyond": {"lr": 0.02}, "closer": {"steps": 7}}
# float64: what differs by the order of sums does not grow into more
SIZES = [
    "--rank",
    2,
    "--seq-len",
    24,
    "--lr",
    0.01,
    "--warmup-steps",
    2,
    "--dtype",
    "float64",
    "--device",
    "cpu",
    "--quiet",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files, and a folder of two."""
    folder = tmp_path_factory.mktemp("data")
    for shift, name in enumerate(NAMES[:2], 1):
        write_task(folder / f"{name}.jsonl", shift)
    (folder / NAMES[2]).mkdir()
    for shift in (3, 4):
        write_task(folder / NAMES[2] / f"{shift}.jsonl", shift)
    (folder / "adapters.json").write_text(json.dumps(OWN))
    return folder


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "whole", model, data)


def command(*argv):
    assert main(["adapters", *map(str, argv)]) == 0


def train(run_dir, model, data, *more, steps=12):
    command("train", "--model", model, "--data", data, "--steps", steps, "--run-dir", run_dir, *SIZES, *more)
    return run_dir


def resume(run_dir, *more):
    command("train", "--resume", "--run-dir", run_dir, "--quiet", *more)


def exported(run_dir, name):
    return load_file(run_dir / "adapters" / name / "adapter_model.safetensors")


def members(run_dir):
    return {entry["name"]: entry for entry in json.loads((run_dir / "adapters.json").read_text())["members"]}


def test_a_run_trains_each_adapter_by_its_own_settings(trained):
    found = members(trained)
    assert {name: (entry["done"], entry["state"]) for name, entry in found.items()} == {
        "away": (12, "training"),
        "beyond": (12, "training"),
        "closer": (7, "finished"),
    }
    assert [found[name]["lr"] for name in NAMES] == [0.01, 0.02, 0.01]
    rows = [row["validation"] for row in read_metrics(trained) if "validation" in row]
    assert all(rows[-1][name] < rows[0][name] for name in NAMES)
    assert all(exported(trained, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_ends_as_it_would_alone(trained, model, data, tmp_path, name):
    alone = tmp_path / "alone"
    alone.mkdir()
    suffix = "" if (data / name).is_dir() else ".jsonl"
    (alone / f"{name}{suffix}").symlink_to(data / f"{name}{suffix}")
    (alone / "adapters.json").write_text(json.dumps({n: own for n, own in OWN.items() if n == name}))
    run_dir = train(tmp_path / "run", model, alone)
    torch.testing.assert_close(exported(run_dir, name), exported(trained, name))


def test_adapters_take_turns(model, data, tmp_path):
    run_dir = train(tmp_path / "run", model, data, "--adapters-per-step", 2, "--rows", 2, steps=9)
    assert [members(run_dir)[name]["done"] for name in NAMES] == [6, 6, 6]


def test_a_kill_and_a_resume_end_in_the_same_bits(trained, model, data, tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    plain = AdapterJob.loss
    calls = stop_at(lambda job, pair: plain(job, *pair), 8)
    monkeypatch.setattr(AdapterJob, "loss", lambda job, model, batch: calls(job, (model, batch)))
    with pytest.raises(KilledError):
        train(parts, model, data, "--checkpoint-every", 5)
    monkeypatch.undo()
    resume(parts)
    for name in ("last.safetensors", *(f"adapters/{name}/adapter_model.safetensors" for name in NAMES)):
        whole, again = load_file(trained / name), load_file(parts / name)
        assert whole.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_adapters_are_added_and_retired(model, data, tmp_path, capsys):
    run_dir = train(tmp_path / "run", model, data, "--slots", 3, steps=4)
    late = write_task(tmp_path / "late.jsonl", 5)
    command("retire", run_dir, "away", "--wait", 0)
    command("add", run_dir, late, "--lr", 0.02, "--steps", 6, "--wait", 0)
    command("add", run_dir, late, "--name", "surplus", "--wait", 0)
    assert "no answer yet" in capsys.readouterr().out
    before = exported(run_dir, "away")
    resume(run_dir, "--steps", 14)
    answers = [json.loads((run_dir / "requests" / f"{n:06}.answer").read_text()) for n in (1, 2, 3)]
    assert answers[1] == {"added": "late", "row": 0}
    assert answers[0]["retired"] == "away"
    assert "no row of the bank is free for 'surplus': slots is 3" in answers[2]["refused"]
    found = members(run_dir)
    assert (found["late"]["done"], found["late"]["state"]) == (6, "finished")
    assert (found["away"]["done"], found["away"]["slot"], found["away"]["state"]) == (4, None, "retired")
    assert found["beyond"]["done"] == 14
    # what is retired stays as it was exported
    assert all(torch.equal(value, before[key]) for key, value in exported(run_dir, "away").items())
    # the late one is as if the run had begun with it
    alone = tmp_path / "alone"
    alone.mkdir()
    late.rename(alone / "late.jsonl")
    (alone / "adapters.json").write_text('{"late": {"lr": 0.02, "steps": 6}}')
    other = train(tmp_path / "other", model, alone, steps=14)
    torch.testing.assert_close(exported(run_dir, "late"), exported(other, "late"))
    command("list", run_dir)
    assert "retired" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        resume(run_dir, "--steps", 16)
    assert "there is no file, folder or match of this name" in capsys.readouterr().err


def test_a_run_ends_when_all_have_their_steps(model, data, tmp_path):
    run_dir = train(tmp_path / "run", model, data, "--adapter-steps", 3, steps=50)
    assert json.loads((run_dir / "result.json").read_text())["step"] == 7
    assert {entry["state"] for entry in members(run_dir).values()} == {"finished"}


@pytest.mark.parametrize("parts", [1, 2])
def test_one_that_diverges_is_left_out(trained, model, data, tmp_path, capsys, parts):
    worse = shutil.copytree(data, tmp_path / "worse")
    write_task(worse / "astray.jsonl", 6)
    (worse / "adapters.json").write_text(json.dumps(OWN | {"astray": {"lr": 1e200}}))
    run_dir = train(tmp_path / "run", model, worse, "--accumulate", parts)
    assert "adapter 'astray' has failed by step 10" in capsys.readouterr().out
    assert members(run_dir)["astray"]["state"] == "failed"
    assert not (run_dir / "adapters" / "astray").exists()
    for name in NAMES:
        torch.testing.assert_close(exported(run_dir, name), exported(trained, name))
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run_dir) if "loss" in row)


def test_parts_of_a_batch_outlive_adapters(model, data, tmp_path):
    """Those of a batch of which one adapter is left."""
    found = []
    for number, parts in enumerate((1, 3)):
        run_dir = train(tmp_path / str(number), model, data, "--adapter-steps", 9, "--accumulate", parts, steps=12)
        found.append(exported(run_dir, "beyond"))
    torch.testing.assert_close(*found)


def test_exports_are_peft_adapters(trained, model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import transformers

    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()  # noqa: E731
    tokens = torch.arange(40, 60).view(2, 10)
    theirs = peft.PeftModel.from_pretrained(load(), trained / "adapters" / "beyond")
    ours = load()
    ctxkern.attach_adapters(ours, 1, 2, "*self_attn.*")
    ctxkern.import_adapter(ours, 0, trained / "adapters" / "beyond")
    with torch.no_grad(), ctxkern.use(ours, adapter_index=torch.tensor([0, 0])):
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_errors(model, data, tmp_path, capsys, trained):
    def fails(*argv, model=model, data=data):
        err = error_of(capsys, "adapters", "train", "--model", model, "--data", data, *SIZES, *argv)
        # transformers shows how it loads weights
        return err.splitlines()[-1]

    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    write_task(bare / "x.jsonl", 1)
    assert "data is ''; it must be a folder" in fails(data="")
    assert "model is ''; it must be a folder or a name on the hub" in fails(model="")
    assert "which is no folder" in fails(data=tmp_path / "absent")
    assert "it must hold files of a known kind" in fails(data=empty)
    assert "it must hold one GGUF file, and has none" in fails(model=empty)
    assert "which means no layer" in fails("--targets", "nothing")
    (bare / "adapters.json").write_text('{"y": {"lr": 1}}')
    assert "adapters.json names 'y'; it must name adapters of the folder: x" in fails(data=bare)
    (bare / "adapters.json").write_text('{"x": {"lr": -1}}')
    assert "x has lr -1; it must be lr or steps, above 0" in fails(data=bare)
    (bare / "adapters.json").write_text('{"x": {"lr": 1e999}}')
    assert "x has lr inf; it must be lr or steps, above 0 and finite" in fails(data=bare)
    assert "no row of the bank is free for 'beyond': slots is 1" in fails("--slots", 1)
    assert "it must be a folder of `ctxkern adapters train`" in failed(capsys, "adapters", "list", tmp_path)
    assert "there is no file or folder of this name" in failed(capsys, "adapters", "add", trained, "absent.txt")
    assert "--steps is 0; it must be above 0" in failed(capsys, "adapters", "add", trained, data, "--steps", 0)
    assert "--lr is inf; it must be above 0, and finite" in failed(
        capsys, "adapters", "add", trained, data, "--lr", "inf"
    )
    assert "it must be a folder of `ctxkern" in failed(capsys, "adapters", "list", trained / "adapters.json")


def test_names_are_those_of_folders():
    roster = Roster(2)
    for name in ("", "..", "../out", "a/b", "a\nb"):
        with pytest.raises(ValueError, match="it must be one that a folder can have"):
            roster.add(name, Path("x"), 0.1, None)
    roster.add("a", Path("x"), 0.1, None).slot = None
    with pytest.raises(ValueError, match="the run has one that is retired of this name"):
        roster.add("a", Path("x"), 0.1, None)


def test_requests_are_numbered_in_the_order_in_which_they_can_be_seen(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda i: requests.ask(tmp_path, {"name": str(i)}), range(40)))
    assert len(set(places)) == 40
    found = requests.waiting(tmp_path, 0)
    assert [number for number, _ in found] == list(range(1, 41))
    assert {request["name"] for _, request in found} == {str(i) for i in range(40)}
    assert [number for number, _ in requests.waiting(tmp_path, 38)] == [39, 40]


@pytest.mark.slow
def test_requests_reach_a_run_that_trains(model, data, tmp_path, capsys):
    run_dir, late = tmp_path / "run", write_task(tmp_path / "late.jsonl", 5)
    flags = ["--model", model, "--data", data, "--steps", 10**6, "--run-dir", run_dir, *SIZES]
    process = start("adapters", "train", *flags, program=("-m", "ctxkern"))
    wait_for_step(process, run_dir, 10)
    command("add", run_dir, late)
    command("retire", run_dir, "beyond")
    assert "added late" in capsys.readouterr().out
    assert "it must be an adapter of the run: away, closer, late" in failed(capsys, "adapters", "retire", run_dir, "x")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    finish(process, status=128 + signal.SIGTERM)
    assert exported(run_dir, "beyond")
    done = json.loads((run_dir / "result.json").read_text())["step"]
    resume(run_dir, "--steps", done + 2)
    assert members(run_dir)["late"]["done"] > 0


@pytest.mark.slow
def test_two_processes_train_what_one_does(trained, model, data, tmp_path):
    flags = ["--model", model, "--data", data, "--steps", 12, "--run-dir", tmp_path / "run", *SIZES]
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ctxkern", "adapters", "train")
    # the third adapter ends at its step 7, and the others have two rows then
    finish(start(*flags, program=program))
    for name in NAMES:
        torch.testing.assert_close(exported(tmp_path / "run", name), exported(trained, name))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_outnumber_the_rows_that_are_left(model, data, tmp_path, sharded):
    few = shutil.copytree(data, tmp_path / "few")
    (few / "adapters.json").write_text('{"beyond": {"steps": 5}, "closer": {"steps": 4}}')
    whole = train(tmp_path / "whole", model, few, steps=8)
    script, run_dir = tmp_path / "sharded.py", tmp_path / "run"
    script.write_text(SHARDED)
    flags = ["--model", model, "--data", few, "--steps", 8, "--run-dir", run_dir, *SIZES]
    what = (script,) if sharded else ("-m", "ctxkern")
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *what, "adapters", "train")
    finish(start(*flags, program=program))
    if sharded:
        resume(run_dir)
    for name in NAMES:
        torch.testing.assert_close(exported(run_dir, name), exported(whole, name))


@pytest.mark.slow
def test_a_sharded_bank_trains_as_a_whole_one(trained, model, data, tmp_path):
    """FSDP2 on two processes; the run then goes on as one, which writes the adapters."""
    script, run_dir = tmp_path / "sharded.py", tmp_path / "run"
    script.write_text(SHARDED)
    flags = ["--model", model, "--data", data, "--steps", 12, "--run-dir", run_dir, *SIZES]
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", script, "adapters", "train")
    out = finish(start(*flags, program=program))
    assert "the model is sharded" in out
    resume(run_dir)
    for name in NAMES:
        torch.testing.assert_close(exported(run_dir, name), exported(trained, name))

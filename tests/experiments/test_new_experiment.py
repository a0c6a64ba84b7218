"""A new experiment is its package and one line: this is one, with flags, help, run folder, kill and resume."""

import ast
import json
import os
import random
import signal
import sys

import pytest
import torch
from helpers.runs import PACKAGE, failed, finish, start, wait_for_step
from safetensors.torch import load_file

from ctxkern import experiments
from ctxkern.cli import main

TOY = """
from dataclasses import dataclass

import torch
from torch import nn

from ctxkern.experiments.core.experiment import Experiment
from ctxkern.experiments.core.settings import RunSettings, setting


@dataclass(kw_only=True)
class ToySettings(RunSettings):
    width: int = setting(8, "width of the hidden layer", at_least=1, group="model")
    lr: float = setting(0.05, "learning rate", above=0, group="optimizer")


class ToyJob:
    def __init__(self, config):
        self.config = config
        torch.manual_seed(config.seed)
        self.model = nn.Sequential(nn.Linear(2, config.width), nn.Dropout(0.1), nn.Tanh(), nn.Linear(config.width, 1))
        self.model.to(config.torch_device())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr)

    def batches(self):
        def batch_at(step):
            x = torch.rand(16, 2, generator=torch.Generator().manual_seed(step))
            return {"x": x, "y": x.prod(1, keepdim=True)}

        return batch_at

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def evaluator(self):
        return lambda model: {"product": self.loss(model, self.batches()(10**6)).item()}


class Toy(Experiment):
    settings = ToySettings
    help = "learn to multiply"
    examples = ("--width 4 --steps 10",)

    def prepare(self, config, inputs):
        return ToyJob(config)
"""
LINE = {"toy": "toy_experiment:Toy"}
PROGRAM = f"import sys; from ctxkern import cli; cli.EXPERIMENTS.update({LINE}); sys.exit(cli.main(sys.argv[1:]))"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of a package `toy_experiment`, which is registered."""
    package = tmp_path / "packages" / "toy_experiment"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(experiments.EXPERIMENTS, *next(iter(LINE.items())))
    yield package.parent
    sys.modules.pop("toy_experiment", None)


def test_a_new_experiment_has_help_and_runs(toy, tmp_path, capsys):
    assert main(["toy", "--help"]) == 0
    out = capsys.readouterr()[0]
    for expected in ("learn to multiply", "model:", "--width INT", "(default: 8)", "--resume", "--run-dir", "--quiet"):
        assert expected in out
    assert "ctxkern toy --width 4 --steps 10" in out
    # it reads no files
    assert "PATHS" not in out
    run_dir = tmp_path / "run"
    assert main(["toy", "--steps", "40", "--width", "4", "--quiet", "--run-dir", str(run_dir)]) == 0
    out = capsys.readouterr()[0]
    assert "parameters  17" in out
    assert "mean validation loss: " in out
    result = json.loads((run_dir / "result.json").read_text())
    assert result["step"] == 40
    assert result["last"]["product"] < result["first"]["product"]
    assert (run_dir / "loss.png").exists()
    assert "width is 0; it must be an integer of at least 1" in failed(capsys, "toy", "--width", "0")
    resume = ["toy", "--resume", "--run-dir", run_dir]
    assert "--width is 5; it must be 4, as in the run in" in failed(capsys, *resume, "--width", "5")
    assert "holds a run of `ctxkern toy`" in failed(capsys, "train", *resume[1:])


def test_a_new_experiment_is_killed_and_resumed(toy, tmp_path):
    steps, rng = 300, random.Random(0)
    path = os.pathsep.join([str(toy), str(PACKAGE)])

    def run(*argv):
        return start("toy", *argv, program=("-c", PROGRAM), PYTHONPATH=path)

    fixed = ["--steps", steps, "--checkpoint-every", 7, "--quiet"]
    finish(run(*fixed, "--run-dir", tmp_path / "whole"))
    process = run(*fixed, "--run-dir", tmp_path / "parts")
    wait_for_step(process, tmp_path / "parts", rng.uniform(0.2, 0.6) * steps)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(run("--resume", "--run-dir", tmp_path / "parts", "--quiet"))
    whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_core_knows_no_experiment():
    core = PACKAGE / "ctxkern" / "experiments" / "core"
    files = list(core.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("ctxkern.experiments") or name.startswith("ctxkern.experiments.core"), path

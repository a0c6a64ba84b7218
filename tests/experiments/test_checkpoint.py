import os
import subprocess
import sys

import pytest
import torch
from helpers.nets import OPTIMIZERS, make_net, step_once, trained_net
from torch import nn

from ctxkern.experiments.core import checkpoint as ckpt
from ctxkern.experiments.core import files
from ctxkern.testing.oracle import assert_same_bits


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_restores_every_bit(tmp_path, name):
    model, optimizer = trained_net(OPTIMIZERS[name])
    path = tmp_path / "a.safetensors"
    ckpt.save_checkpoint(path, model, optimizer, step=3, config={"a": (1, 2)}, extra={"best": 0.5})
    other = make_net(seed=9)
    other_optimizer = OPTIMIZERS[name](other.parameters(), lr=0.1)
    state = ckpt.load_checkpoint(path, other, other_optimizer, config={"a": (1, 2)})
    assert (state.step, state.extra) == (3, {"best": 0.5})
    assert_same_bits(model, other)
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        net.eval()
        step_once(net, opt, 7)
    assert_same_bits(model, other)


def test_checkpoint_of_tied_and_half_weights(tmp_path):
    def make():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
        net[1].weight = net[0].weight
        return net

    model, other = make(), make()
    ckpt.save_checkpoint(tmp_path / "a.safetensors", model, step=0)
    ckpt.load_checkpoint(tmp_path / "a.safetensors", other)
    assert_same_bits(model, other)


def test_bad_checkpoints_are_told_apart(tmp_path):
    model, optimizer = trained_net()
    path = tmp_path / "a.safetensors"
    with pytest.raises(ckpt.CheckpointError, match=r"no checkpoint at .*a\.safetensors"):
        ckpt.load_checkpoint(path, model)
    ckpt.save_checkpoint(path, model, step=3, config={"d_model": 8, "seed": 0})
    with pytest.raises(ckpt.CheckpointError, match="d_model is 8 there and 16 here"):
        ckpt.load_checkpoint(path, model, config={"d_model": 16, "seed": 0})
    with pytest.raises(ckpt.CheckpointError, match="holds no optimizer state"):
        ckpt.load_checkpoint(path, model, optimizer)
    with pytest.raises(ckpt.CheckpointError, match=r"0\.bias is \(8,\) there and \(3,\) in the model"):
        ckpt.load_checkpoint(path, nn.Sequential(nn.Linear(6, 3)))
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    for content, message in ((good[:-5], "damaged"), (b"", "damaged"), (bytes(flipped), "checksum")):
        path.write_bytes(content)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ckpt.CheckpointError, match=message):
            ckpt.load_checkpoint(path, model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ckpt.require("safetensors.torch").save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ckpt.CheckpointError, match="no checkpoint of this version"):
        ckpt.load_checkpoint(path, model)


def test_optimizer_of_other_groups_is_refused(tmp_path):
    model, optimizer = trained_net()
    ckpt.save_checkpoint(tmp_path / "a.safetensors", model, optimizer, step=3)
    parts = torch.optim.AdamW([{"params": list(model[0].parameters())}, {"params": list(model[3].parameters())}])
    with pytest.raises(ckpt.CheckpointError, match=r"groups of \[4\] there and \[2, 2\] here"):
        ckpt.load_checkpoint(tmp_path / "a.safetensors", model, parts)


def test_failure_before_the_replace_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    model, _ = trained_net()
    path = tmp_path / "a.safetensors"
    ckpt.save_checkpoint(path, model, step=1)
    good = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ckpt.save_checkpoint(path, make_net(seed=5), step=2)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["a.safetensors"]


CRASH = """
import os, sys, torch
from ctxkern.experiments.core import checkpoint, files
files.os.replace = lambda *_: os._exit(9)
checkpoint.save_checkpoint(sys.argv[1], torch.nn.Linear(3, 3), step=2)
"""


def test_death_between_write_and_replace_keeps_the_previous_checkpoint(tmp_path):
    model = nn.Linear(3, 3)
    path = tmp_path / "a.safetensors"
    ckpt.save_checkpoint(path, model, step=1)
    done = subprocess.run([sys.executable, "-c", CRASH, str(path)], check=False)
    assert done.returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    assert ckpt.load_checkpoint(path, nn.Linear(3, 3)).step == 1
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a.safetensors"]


class Counting(nn.Linear):
    """A layer whose extra state is nested: containers, tensors, keys and values of several types."""

    def __init__(self):
        super().__init__(3, 3)
        self.extra = {}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRA = {
    "scale": torch.tensor([1.5, 2.5], dtype=torch.float16),
    "history": [torch.arange(3), None, [torch.zeros(0), 1.0]],
    "pair": (1, "two", {3: float("inf"), "kind": False}),
    4: {"shared": None},
}


def assert_equal_trees(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key, value in first.items():
            assert_equal_trees(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_equal_trees(*pair)
    else:
        assert first == second


def test_extra_state_of_nested_values(tmp_path):
    model, other = nn.Sequential(Counting(), Counting()), nn.Sequential(Counting(), Counting())
    model[0].extra = EXTRA | {4: {"shared": model[0].weight}}
    # a state that is a tensor, as torch's quantisation has it
    model[1].extra = torch.ones(2)
    other[1].extra = torch.ones(5)
    path = tmp_path / "a.safetensors"
    ckpt.save_checkpoint(path, model, step=1)
    ckpt.load_checkpoint(path, other)
    assert_equal_trees(other[0].extra, {**model[0].extra, 4: {"shared": model[0].weight.detach()}})
    assert torch.equal(other[1].extra, torch.ones(2))
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_state_that_cannot_be_saved_is_named_and_nothing_is_written(tmp_path):
    model = Counting()
    model.extra = {"when": [object()]}
    with pytest.raises(ckpt.CheckpointError, match=r"model\._extra_state\.when\.0 is of the type object; it must be a"):
        ckpt.save_checkpoint(tmp_path / "a.safetensors", model, step=1)
    assert os.listdir(tmp_path) == []


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    model, other = Counting(), Counting()
    model.extra = {"rows": [whole[0], whole[:2], whole[1:]], "again": whole}
    ckpt.save_checkpoint(tmp_path / "a.safetensors", model, step=1)
    ckpt.load_checkpoint(tmp_path / "a.safetensors", other)
    assert_equal_trees(other.extra, model.extra)

"""What was attached, saved and loaded."""

import copy

import pytest
import torch
from helpers.attached import B, D, K, Model, S, new_model, randomise, with_adapters, with_contexts
from torch import nn

import ctxkern


@pytest.fixture
def model():
    return new_model()


@pytest.mark.parametrize("attach", [with_contexts, with_adapters, lambda m: with_contexts(m, rank=2)])
def test_files(model, attach, tmp_path):
    pytest.importorskip("safetensors")
    plain = copy.deepcopy(model)
    attach(model)
    ctxkern.save_attached(model, tmp_path / "new" / "folder")
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert ctxkern.load_attached(plain, tmp_path / "new" / "folder") == names
    x = torch.randn(B, S, D)
    how = (
        {"context": torch.randn(B, K)}
        if hasattr(model.blocks[0].up, "bilinear")
        else {"adapter_index": torch.arange(4) - 1}
    )
    with ctxkern.use(model, **how), ctxkern.use(plain, **how):
        assert torch.equal(plain(x), model(x))
    # into one that has it attached already
    randomise(plain)
    ctxkern.load_attached(plain, tmp_path / "new" / "folder")
    with ctxkern.use(model, **how), ctxkern.use(plain, **how):
        assert torch.equal(plain(x), model(x))
    base_bytes = sum(p.nbytes for p in Model().parameters())
    added = sum(t.nbytes for n, t in model.state_dict().items() if n not in Model().state_dict())
    size = (tmp_path / "new" / "folder" / "attached.safetensors").stat().st_size
    assert added <= size < added + base_bytes + 2000


def test_files_that_do_not_fit(model, tmp_path):
    pytest.importorskip("safetensors")
    with_contexts(model)
    ctxkern.save_attached(model, tmp_path)
    other = nn.Sequential(nn.Linear(D, D))
    with pytest.raises(ValueError, match="the files have layer 'blocks.0.up'; the model has no linear layer"):
        ctxkern.load_attached(other, tmp_path)
    wide = Model()
    wide.blocks[1].down = nn.Linear(2 * D, D + 1)
    with pytest.raises(ValueError, match=r"'blocks.1.down' has a weight of \[9, 16\]; the files are for \[8, 16\]"):
        ctxkern.load_attached(wide, tmp_path)
    assert type(wide.blocks[0].up) is nn.Linear
    adapters = with_adapters(Model())
    with pytest.raises(ValueError, match="'kind': 'adapters'.* attached; the files have .*'kind': 'contexts'"):
        ctxkern.load_attached(adapters, tmp_path)
    text = (tmp_path / "attached.json").read_text()
    (tmp_path / "attached.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="attached.json has version 7; it must be 1"):
        ctxkern.load_attached(Model(), tmp_path)
    with pytest.raises(FileNotFoundError):
        ctxkern.load_attached(Model(), tmp_path / "nowhere")

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
    (tmp_path / "attached.json").write_text(text)
    with pytest.raises(TypeError, match="model is a str; it must be a torch.nn.Module"):
        ctxkern.load_attached("model", tmp_path)
    for changed, words in (
        ("[]", "attached.json holds a list; it must hold an object"),
        ("{", "attached.json is no JSON"),
        ('{"version": 1}', "has other layers than save_attached writes"),
        (text.replace('"kind": "contexts"', '"kind": "other"'), "has other layers than save_attached writes"),
    ):
        (tmp_path / "attached.json").write_text(changed)
        with pytest.raises(ValueError, match=words):
            ctxkern.load_attached(Model(), tmp_path)
    (tmp_path / "attached.json").write_text(text)
    (tmp_path / "attached.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"attached.safetensors cannot be read"):
        ctxkern.load_attached(Model(), tmp_path)


def test_models_in_wrappers_and_parts(model, tmp_path):
    """Names are those of the model, whatever is around it."""
    pytest.importorskip("safetensors")
    compiled = torch.compile(model, backend="eager")
    names = ctxkern.attach_adapters(compiled, 2, 3, ["up", "down"])
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    ctxkern.save_attached(compiled, tmp_path / "whole")
    other = Model()
    assert ctxkern.load_attached(torch.compile(other, backend="eager"), tmp_path / "whole") == names
    assert torch.equal(other.blocks[0].up.lora_A, model.blocks[0].up.lora_A)
    ctxkern.export_adapter(compiled, 1, tmp_path / "peft")
    ctxkern.import_adapter(compiled, 0, tmp_path / "peft")
    assert torch.equal(model.blocks[0].up.lora_A[0], model.blocks[0].up.lora_A[1])
    part = Model()
    ctxkern.attach_adapters(part.blocks[0], 2, 3, "up")
    ctxkern.save_attached(part, tmp_path / "part")
    with torch.no_grad():
        before = part.blocks[0].up.lora_A.clone()
        part.blocks[0].up.lora_A.zero_()
    assert ctxkern.load_attached(part, tmp_path / "part") == ["up"]
    assert torch.equal(part.blocks[0].up.lora_A, before)
    with pytest.raises(ValueError, match="layer 'up' was attached in a part of the model; it takes that part"):
        ctxkern.export_adapter(part, 0, tmp_path / "no")

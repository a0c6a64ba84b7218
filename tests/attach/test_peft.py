"""PEFT's files: what PEFT makes of ours, and we of its, gives the results of the other."""

import json
import re

import pytest
import torch
from torch import nn

import ctxkern
from ctxkern.testing.oracle import assert_matches

peft = pytest.importorskip("peft", reason="peft is not installed")

D, R = 8, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.head = nn.Linear(D, 12), nn.Linear(12, D, bias=False), nn.Linear(D, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


def net():
    torch.manual_seed(0)
    return Net()


def bank(n=3, rank=R, alpha=8, targets=("q_proj", "v_proj")):
    model = net()
    ctxkern.attach_adapters(model, n, rank, list(targets), alpha=alpha)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.4)
    return model


def theirs(**config):
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **config))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.4)
    return model.eval()


def values(model, x, parameters):
    """Output and gradients of x and parameters, which are {name: tensor}."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(("x", *parameters), grads, strict=True))}


def of_peft(model):
    found = {}
    for name, p in model.named_parameters():
        match = re.search(r"(\w+)\.lora_([AB])\.default", name)
        if match:
            found[".".join(match.groups())] = p.requires_grad_()
    return found


def of_bank(model, i, got):
    """Gradients of one adapter out of those of the bank."""
    return {name: g if name in ("x", "y") else g[i] for name, g in got.items()}


def bank_parameters(model):
    return {
        f"{name}.{which}": getattr(getattr(model, name), f"lora_{which}")
        for name in ("q_proj", "v_proj")
        for which in "AB"
    }


def assert_equal_maps(model, i, other, rank=R):
    """Outputs and gradients of adapter i and of PEFT's model, both against PEFT's in float64."""
    x = torch.randn(2, 5, D)
    with ctxkern.use(model, adapter_index=torch.full((2,), i)):
        got = of_bank(model, i, values(model, x, bank_parameters(model)))
    for name in list(got):
        if name[-1] in "AB":
            got[name] = got[name][:rank] if name[-1] == "A" else got[name][:, :rank]
    want = values(other, x, of_peft(other))
    exact = values(other.double(), x.double(), of_peft(other))
    assert_matches(got, exact, want)


def test_peft_loads_what_is_exported(tmp_path):
    model = bank()
    ctxkern.export_adapter(model, 1, tmp_path)
    other = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert_equal_maps(model, 1, other)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"r": 2}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
    ids=str,
)
def test_what_peft_saved_is_imported(tmp_path, config):
    other = theirs(**{"r": R, "lora_alpha": 5} | config)
    other.save_pretrained(tmp_path)
    model = bank()
    ctxkern.import_adapter(model, 2, tmp_path)
    x = torch.randn(2, 5, D)
    with ctxkern.use(model, adapter_index=torch.tensor([2, 2])):
        got = {"y": model(x).detach()}
    want = {"y": other(x).detach()}
    assert_matches(got, {"y": other.double()(x.double()).detach()}, want)
    if not config:
        assert_equal_maps(model, 2, other.float())


def test_round_trip_by_peft(tmp_path):
    model = bank()
    ctxkern.export_adapter(model, 0, tmp_path / "ours")
    peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    ctxkern.import_adapter(model, 2, tmp_path / "theirs")
    for name, t in bank_parameters(model).items():
        assert torch.equal(t[0], t[2]), name
    assert model.q_proj.lora_scale.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "adapter_config.json has use_dora True; it must be False"),
        ({"r": 8}, "layer 'q_proj' has rank 8 in the files; the bank takes up to 4"),
        ({"target_modules": ["q_proj"]}, "layer 'v_proj' is in the bank and not in the files"),
        ({"target_modules": ["q_proj", "v_proj", "head"]}, "layer 'head' is in the files and not in the bank"),
        ({"bias": "all"}, "adapter_config.json has bias 'all'; it must be 'none'"),
        ({"modules_to_save": ["head"]}, r"adapter_config.json has modules_to_save \['head'\]; it must be None"),
        ({"init_lora_weights": "pissa"}, "adapter_config.json has init_lora_weights 'pissa'; it must be True"),
        ({"init_lora_weights": "olora"}, "adapter_config.json has init_lora_weights 'olora'; it must be True"),
        ({"alora_invocation_tokens": [1]}, r"adapter_config.json has alora_invocation_tokens \[1\]; it must be None"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_do_not_fit(tmp_path, config, words):
    peft.get_peft_model(
        net(), peft.LoraConfig(**{"r": R, "target_modules": ["q_proj", "v_proj"]} | config)
    ).save_pretrained(tmp_path)
    model = bank()
    before = {name: t.clone() for name, t in bank_parameters(model).items()}
    with pytest.raises(ValueError, match=words):
        ctxkern.import_adapter(model, 0, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in bank_parameters(model).items())


@pytest.mark.parametrize(
    ("alpha", "words"), [(None, "the alpha None for layer"), ("x", "the alpha 'x' for layer"), (True, "the alpha True")]
)
def test_damaged_files_leave_the_bank_as_it_was(tmp_path, alpha, words):
    model = bank()
    ctxkern.export_adapter(model, 1, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    before = {name: t.clone() for name, t in bank_parameters(model).items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha, "alpha_pattern": {}}))
    with pytest.raises(ValueError, match=words):
        ctxkern.import_adapter(model, 0, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json holds a list; it must hold an object"):
        ctxkern.import_adapter(model, 0, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"import_adapter: adapter_model.safetensors cannot be read"):
        ctxkern.import_adapter(model, 0, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in bank_parameters(model).items())


def test_a_number_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="i is 3; layer 'q_proj' has adapters 0 to 2"):
        ctxkern.export_adapter(bank(), 3, tmp_path)
    with pytest.raises(FileNotFoundError):
        ctxkern.import_adapter(bank(), 0, tmp_path)


def test_conv1d(tmp_path):
    """transformers' layer with the weight turned: as an nn.Linear with the same weight."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    turned, plain = nn.Sequential(conv1d(6, D)), nn.Sequential(nn.Linear(D, 6))
    plain[0].weight, plain[0].bias = nn.Parameter(turned[0].weight.detach().mT), nn.Parameter(turned[0].bias.detach())
    x, table = torch.randn(2, 5, D), torch.randn(2, 3)
    for model in (turned, plain):
        ctxkern.attach_contexts(model, 3, "0")
        torch.manual_seed(1)
        nn.init.normal_(model[0].bilinear)
    assert isinstance(turned[0], conv1d)
    with ctxkern.use(turned, context=table), ctxkern.use(plain, context=table):
        torch.testing.assert_close(turned(x), plain(x))
        want = turned(x)[:1]
    ctxkern.detach(turned, context=table[0])
    torch.testing.assert_close(turned(x[:1]), want)
    assert type(turned[0]) is conv1d
    ctxkern.attach_adapters(turned, 2, 2, "0")
    nn.init.normal_(turned[0].lora_B)
    ctxkern.export_adapter(turned, 1, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with ctxkern.use(turned, adapter_index=torch.tensor([1, 1])):
        want = turned(x)
    ctxkern.detach(turned, adapter=1)
    torch.testing.assert_close(turned(x), want)

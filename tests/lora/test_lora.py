"""lora_linear and DynamicLoraLinear: against the oracle, and against what they extend."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctxkern
from ctxkern.nn import DynamicLoraLinear
from ctxkern.reference import lora_linear_ref
from ctxkern.testing.cases import CASES
from ctxkern.testing.families import lora_arguments
from ctxkern.testing.oracle import check_family

# dtypes of x, the adapters and the weight
DTYPES = {
    "f32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16, torch.float16),
    "f64": (torch.float64, torch.float64, torch.float64),
    "bf16-f32-adapters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "f16-f32-adapters": (torch.float16, torch.float32, torch.float16),
    "bf16-f32-weight": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16-f32-both": (torch.bfloat16, torch.float32, torch.float32),
}
TABLE = [case for case in CASES if not case.per_token and case.id not in ("wide-k", "debug", "deep")]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", TABLE, ids=lambda c: c.id)
def test_matches_the_oracle(case, dtypes):
    arguments, dout = lora_arguments(case, 3, *dtypes)
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


@pytest.mark.parametrize("rank", [0, 1, 2, 5, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared"])
def test_ranks(name, dtype, rank):
    case = next(case for case in CASES if case.id == name)
    arguments, dout = lora_arguments(case, rank, dtype)
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


@pytest.mark.parametrize("scale", [0, 1, -2.5, 1e-3])
def test_scales(scale):
    arguments, dout = lora_arguments(CASES[2], 3, scale=scale)
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


@pytest.mark.parametrize("workspace", [1, 1 << 10])
@pytest.mark.parametrize("dtypes", [DTYPES["f32"], DTYPES["bf16-f32-both"]], ids=["f32", "bf16-f32-both"])
@pytest.mark.parametrize("name", ["odd", "shared-uneven", "ragged-shared", "no-weight"])
def test_little_workspace(monkeypatch, name, dtypes, workspace):
    monkeypatch.setattr(ctxkern.functional, "DEFAULT_WORKSPACE", workspace)
    case = next(case for case in CASES if case.id == name)
    arguments, dout = lora_arguments(case, 3, *dtypes)
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


def test_strided_adapters():
    arguments, dout = lora_arguments(CASES[2], 3)
    arguments["A"] = arguments["A"].mT.contiguous().mT
    arguments["B"] = arguments["B"].repeat_interleave(2, -1)[..., ::2]
    arguments["weight"] = arguments["weight"].repeat_interleave(2, 0)[::2]
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


def test_one_adapter_for_all_expanded():
    arguments, dout = lora_arguments(CASES[2], 3)
    for name in ("A", "B"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    check_family(ctxkern.lora_linear, lora_linear_ref, arguments, dout)


def adapters(batch=3, rank=2, d_in=6, d_out=4):
    return torch.randn(batch, rank, d_in), torch.randn(batch, d_out, rank)


X = torch.randn(3, 5, 6)


class TestModule:
    def test_without_adapters_it_is_the_linear_layer(self):
        torch.manual_seed(0)
        plain = nn.Linear(6, 4)
        torch.manual_seed(0)
        layer = DynamicLoraLinear(6, 4, alpha=3, dropout=0.5)
        assert layer.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(layer(X), plain(X))
        x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
        layer(x).sum().backward()
        plain(again).sum().backward()
        assert torch.equal(x.grad, again.grad)
        assert torch.equal(layer.weight.grad, plain.weight.grad)

    @pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4, 2.0), (1, 0.5), (0, 0.0)])
    def test_scale_is_alpha_over_rank(self, alpha, scale):
        layer = DynamicLoraLinear(6, 4, alpha=alpha)
        A, B = adapters()
        want = ctxkern.lora_linear(X, layer.weight, A, B, scale, layer.bias)
        assert torch.equal(layer(X, A, B), want)

    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_a_merged_layer_a_sequence(self, bias):
        layer = DynamicLoraLinear(6, 4, bias, alpha=3)
        A, B = adapters()
        y = layer(X, A, B)
        for b in range(3):
            merged = layer.weight + 1.5 * B[b] @ A[b]
            torch.testing.assert_close(y[b], F.linear(X[b], merged, layer.bias))

    def test_adapter_index_and_packed_sequences(self):
        layer, (A, B) = DynamicLoraLinear(6, 4), adapters(2)
        index = torch.tensor([1, 0, 1])
        padded = layer(X, A, B, adapter_index=index)
        torch.testing.assert_close(padded, layer(X, A[index], B[index]))
        bounds = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
        packed = layer(X.flatten(0, 1), A, B, adapter_index=index, cu_seqlens=bounds)
        torch.testing.assert_close(packed, padded.flatten(0, 1))

    def test_dropout_only_in_training_and_only_before_the_adapter(self):
        layer, (A, B) = DynamicLoraLinear(6, 4, dropout=0.5), adapters()
        kept = layer.eval()(X, A, B)
        assert torch.equal(kept, layer(X, A, B))
        layer.train()
        torch.manual_seed(0)
        dropped = layer(X, A, B)
        assert not torch.allclose(dropped, kept)
        torch.manual_seed(0)
        thinned = F.dropout(X, 0.5)
        torch.testing.assert_close(dropped, layer(X) + ctxkern.lora_linear(thinned, None, A, B))
        assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias))

    def test_gradients_reach_what_makes_the_adapters(self):
        layer = DynamicLoraLinear(6, 4)
        maker = nn.Linear(2, 2 * 6 + 4 * 2)
        made = maker(torch.randn(3, 2))
        layer(X, made[:, :12].view(3, 2, 6), made[:, 12:].view(3, 4, 2)).sum().backward()
        assert maker.weight.grad.abs().sum() > 0
        assert layer.weight.grad.abs().sum() > 0

"""Initialisation: statistics of fresh layers, the same however and wherever they are made."""

import pytest
import torch
from torch import nn

from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.nn import (
    Bilinear,
    BilinearFactors,
    ContextModulatedAttention,
    DynamicLoraLinear,
    EinsumContextModulatedAttention,
    ModulatedLinear,
    init_bilinear_,
    init_factors_,
)
from ctxkern.nn.block import TransformerBlock
from ctxkern.nn.init import MODES

D, K = 64, 16
MADE = {
    "modulated": lambda: ModulatedLinear(D, 32, K),
    "modulated-rank": lambda: ModulatedLinear(D, 32, K, rank=4),
    "attention-rank": lambda: ContextModulatedAttention(D, K, 4, rank=4),
    "lora": lambda: DynamicLoraLinear(D, 32),
    "bilinear": lambda: Bilinear(D, K, 32),
    "block": lambda: TransformerBlock(D, K, 4),
    "transformer": lambda: MultiFileTransformer(MultiFileConfig(80, 40, d_model=D, n_layers=1, seq_len=32)),
}
MADE |= {
    f"attention-{mode}": lambda mode=mode: ContextModulatedAttention(D, K, 4, bias=True, init=mode) for mode in MODES
}
MADE |= {"einsum": lambda: EinsumContextModulatedAttention(D, K, 4)}


def reset_by_module(model):
    """As loaders of large models do, outer modules first."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def reset_whole(model):
    model.reset_parameters()


@pytest.mark.parametrize(
    ("name", "reset"),
    [(name, reset_by_module) for name in MADE] + [(name, reset_whole) for name in MADE if name != "block"],
)
def test_made_on_the_meta_device_and_reset(name, reset):
    torch.manual_seed(0)
    direct = MADE[name]()
    with torch.device("meta"):
        model = MADE[name]()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    reset(model)
    for (name, p), q in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert torch.isfinite(p).all(), name
        # the spread of `low_rank` is that of four numbers a row
        assert p.float().std(correction=0).item() == pytest.approx(q.float().std(correction=0).item(), rel=0.4), name
        assert abs((p.mean() - q.mean()).item()) <= 0.5 * q.std(correction=0).item(), name


def spread(layer, context):
    """Standard deviation of the attention scores of unit-variance tokens."""
    q, k, _ = layer.qkv(torch.randn(len(context), 32, layer.d_model), context, None)
    return (q @ k.mT / layer.d_model**0.5).std().item()


@pytest.mark.parametrize("mode", MODES)
def test_scores_start_near_those_of_plain_attention(mode):
    torch.manual_seed(0)
    layer = ContextModulatedAttention(64, 16, init=mode)
    plain, modulated = (spread(layer, scale * torch.randn(8, 16)) for scale in (0, 1))
    if mode == "randn":
        assert modulated > 100 * plain
    else:
        assert 0.8 * plain < modulated < 3 * plain


def test_the_modulated_part_compared_with_an_ordinary_weight():
    torch.manual_seed(0)
    made = {mode: init_bilinear_(torch.empty(64, 64, 16), mode) for mode in MODES}
    ordinary = nn.Linear(64, 64).weight.std().item()
    context = torch.randn(16, 256)
    part = {mode: (t @ context).std().item() / ordinary for mode, t in made.items()}
    assert part["hyperfan"] == pytest.approx(1, rel=0.15)
    assert part["normal"] == pytest.approx(0.1, rel=0.15)
    assert part["low_rank"] == pytest.approx(0.1, rel=0.5)
    assert part["randn"] > 50
    assert torch.linalg.matrix_rank(made["low_rank"].flatten(1)) == 4
    assert all(t.abs().max() > 0 for t in made.values())


def test_factors_start_as_far_from_the_weight_as_the_tensor():
    torch.manual_seed(0)
    ordinary = nn.Linear(64, 64).weight.std().item()
    for rank in (1, 4, 64):
        for mode, share in (("normal", 0.1), ("hyperfan", 1), ("low_rank", 0.1)):
            parts = [
                (BilinearFactors(64, 64, 16, rank, init=mode).tensor() @ torch.randn(16, 64)).std() for _ in range(20)
            ]
            assert torch.stack(parts).mean().item() / ordinary == pytest.approx(share, rel=0.25), (rank, mode)
    factors = torch.empty(64, 4), torch.empty(16, 4), torch.empty(4, 64)
    with pytest.raises(ValueError, match="init is 'zeros'; it must be one of"):
        init_factors_(*factors, "zeros")
    init_factors_(*factors, context_std=10.0)
    assert factors[1].std().item() == pytest.approx(0.025, rel=0.3)


def test_context_std_is_divided_out():
    torch.manual_seed(0)
    one, ten = (init_bilinear_(torch.empty(64, 64, 16), context_std=std).std() for std in (1.0, 10.0))
    assert one / ten == pytest.approx(10, rel=0.05)


def test_same_start_under_a_seed():
    starts = []
    for cls in (ContextModulatedAttention, EinsumContextModulatedAttention):
        torch.manual_seed(5)
        starts.append(cls(D, K, 2, bias=True).state_dict())
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])

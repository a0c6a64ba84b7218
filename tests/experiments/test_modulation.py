"""Contexts of one norm, contexts dropped, penalties of bilinear tensors, and how far all have moved."""

import pytest
import torch
from helpers.runs import tiny

from ctxkern.experiments.core.runlog import read_metrics
from ctxkern.experiments.multifile.config import TrainConfig
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.experiments.multifile.modulation import movement, penalty, projections
from ctxkern.experiments.multifile.train import build_optimizer, prepare, train

K, FILES = 4, 3


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 2, "context_dim": K, "seq_len": 6, "init": "hyperfan"}
    return MultiFileTransformer(MultiFileConfig(11, FILES, **sizes | changes)).double()


TOKENS = torch.randint(11, (FILES, 6), generator=torch.Generator().manual_seed(0))


def test_contexts_have_the_norm_of_their_width():
    model = make_model()
    norms = model.contexts().norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, K**0.5))
    with torch.no_grad():
        out = model(TOKENS, file_ids=torch.arange(FILES))
        model.context_embeddings.weight.mul_(7.0)
        torch.testing.assert_close(model(TOKENS, file_ids=torch.arange(FILES)), out)
        model.context_embeddings.weight[1] = 0
    assert not model.contexts()[1].any()
    single = make_model(context_dim=64).float()
    with torch.no_grad():
        single.context_embeddings.weight[1] = 0
    assert not single.contexts()[1].any()
    plain = make_model(context_norm=False)
    assert plain.contexts() is plain.context_embeddings.weight


@pytest.mark.parametrize("route", ["ids", "contexts"])
def test_dropped_contexts_are_zeros_and_train_alone(route):
    model = make_model(context_dropout=0.5).train()
    ids = torch.arange(FILES).repeat(20)
    tokens = TOKENS.repeat(20, 1)
    given = {"file_ids": ids} if route == "ids" else {"contexts": model.get_file_context(ids)}
    out = model(tokens, **given)
    model.eval()
    none = model(tokens, torch.zeros(len(ids), K, dtype=torch.float64))
    whole = model(tokens, file_ids=ids)
    dropped = torch.isclose(out, none).all(2).all(1)
    assert 15 < int(dropped.sum()) < 45
    torch.testing.assert_close(out[~dropped], whole[~dropped])


@pytest.mark.parametrize("rank", [None, 2])
def test_penalties_are_those_of_the_whole_tensors(rank):
    model = make_model(rank=rank)
    squares = sum(bilinear.square().mean() for _, bilinear in projections(model))
    values = sum(torch.linalg.svdvals(t.flatten(0, 1)).sum() / t.numel() ** 0.5 for _, t in projections(model))
    torch.testing.assert_close(penalty(model, norm=0.3, rank=0.7), 0.3 * squares + 0.7 * values)
    penalty(model, norm=1.0, rank=1.0).backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved
    assert all("bilinear_" in name for name in moved)


@torch.no_grad()
def test_movement_is_that_of_the_weights():
    model = make_model()
    start = model.contexts().detach().clone()
    model.context_embeddings.weight[0] *= -2
    found = movement(model, start)
    change = base = 0.0
    for weight, bilinear in projections(model):
        for context in model.contexts():
            change += float((bilinear @ context).square().sum()) / FILES
        base += float(weight.square().sum())
    assert found["weight_change"] == pytest.approx((change / base) ** 0.5)
    # one of three has turned round
    assert found["context_movement"] == pytest.approx(2 / 3)


def test_contexts_learn_at_their_own_rate():
    model = make_model()
    groups = build_optimizer(model, TrainConfig(lr=1e-3, context_lr_scale=20.0)).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.context_embeddings.weight)] == pytest.approx(0.02)
    assert rates[id(model.head.weight)] == pytest.approx(1e-3)


def test_a_run_logs_both_and_trains_under_penalties(tmp_path, paths):
    losses = {}
    for name, changes in {"plain": {}, "held": {"norm_penalty": 1e4, "rank_penalty": 10.0}}.items():
        job = prepare(tiny(training_steps=40, lr=1e-2, bilinear_lr_scale=1.0, **changes), paths)
        train(job, tmp_path / name, progress=False)
        rows = [row for row in read_metrics(tmp_path / name) if "observed" in row]
        assert rows[0]["observed"]["context_movement"] == pytest.approx(0, abs=1e-6)
        assert rows[-1]["observed"]["context_movement"] > 1e-4
        losses[name] = rows[-1]["observed"]["weight_change"]
    assert losses["held"] < 0.5 * losses["plain"]

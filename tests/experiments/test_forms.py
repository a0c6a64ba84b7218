"""Forms in which a context enters: all train, generate, gain files, and say what they cost."""

import json

import pytest
import torch
from torch.testing import assert_close

from ctxkern.cli import main
from ctxkern.experiments.multifile.adapt import adapt_file
from ctxkern.experiments.multifile.forms import FORMS, adapters
from ctxkern.experiments.multifile.generate import generate
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.experiments.multifile.run import load_run
from ctxkern.experiments.multifile.train import batch_loss

SIZES = {"d_model": 8, "n_heads": 2, "n_layers": 2, "context_dim": 4, "seq_len": 12, "lora_rank": 2}
WITH_CONTEXT = [form for form in FORMS if form != "none"]


def made(form, seed=0, **changes):
    torch.manual_seed(seed)
    model = MultiFileTransformer(MultiFileConfig(11, 3, form=form, **SIZES | changes)).double()
    if form == "none":
        return model
    # no file is as the others at step 0, where B and the maps of film are zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "film" in name or name.startswith("context_"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(rows=4, length=9, seed=1):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


FILES = torch.tensor([2, 0, 2, 1])


@pytest.mark.parametrize("form", FORMS)
def test_both_routes_are_equal(form):
    model = made(form).eval()
    by_id = model(tokens(), file_ids=FILES)
    assert_close(model(tokens(), model.get_file_context(FILES)), by_id)
    assert by_id.shape == (4, 9, 11)


@pytest.mark.parametrize("form", WITH_CONTEXT)
def test_files_differ(form):
    model = made(form).eval()
    one, other = (model(tokens(1), file_ids=torch.tensor([i])) for i in (0, 1))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_gradient(form):
    model = made(form)
    batch = {"input": tokens(), "target": tokens(seed=2), "file_id": FILES}
    loss = batch_loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        # the file that no sequence is of is not in the batch
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    if form != "none":
        assert model.context_embeddings.weight.grad.any(1).all()


@pytest.mark.parametrize("form", ["film", "lora", "token", "added"])
def test_step_0_is_that_of_no_context(form):
    """film and lora compute nothing yet, and the weights of all are those that the model without contexts has."""
    torch.manual_seed(0)
    plain = MultiFileTransformer(MultiFileConfig(11, 3, form="none", **SIZES)).eval()
    torch.manual_seed(0)
    model = MultiFileTransformer(MultiFileConfig(11, 3, form=form, context_std=0.0, **SIZES)).eval()
    shared = plain.state_dict()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in shared.items())
    if form != "token":
        assert torch.equal(model(tokens(), file_ids=FILES), plain(tokens()))


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form):
    model = made(form).eval()
    changed = tokens().clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = (model(t, file_ids=FILES) for t in (tokens(), changed))
    assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_a_cache_is_that_without(form):
    # past the window of 12
    model = made(form)
    found = [generate(model, tokens(), FILES, max_new_tokens=8, use_cache=kept) for kept in (True, False)]
    assert torch.equal(*found)


def test_padding_is_not_seen_with_a_token_in_front():
    model = made("token").eval()
    padded = torch.cat([tokens(), tokens(length=2, seed=5)], 1)
    mask = torch.arange(11).expand(4, 11) >= 9
    shown = model(padded, file_ids=FILES, padding_mask=mask)[:, :9]
    assert_close(shown, model(tokens(), file_ids=FILES))


def test_lora_is_weights_of_each_file():
    model = made("lora").eval()
    rows = model.contexts().detach()
    assert rows.shape == (3, 2 * 3 * 2 * 2 * 8)
    for file_id in range(3):
        plain = made("none").eval()
        plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("context_")})
        pairs = adapters(rows[file_id : file_id + 1], 8, 2)
        with torch.no_grad():
            for block in plain.blocks:
                for name in "qkv":
                    A, B = next(pairs)
                    getattr(block.attention, f"W_{name}_base").weight.add_((B[0] @ A[0]).mT)
        assert_close(model(tokens(2), file_ids=torch.full((2,), file_id)), plain(tokens(2)))


def test_counts():
    """Of the context and what maps it; the model without contexts is the base of all."""
    base = made("none").parameter_counts()
    assert base["context"] == base["bilinear"] == 0
    expected = {
        "bilinear": {"bilinear": 2 * 3 * 8 * 8 * 4, "context": 3 * 4},
        "token": {"context": 3 * 8},
        "added": {"context": 3 * 8},
        "film": {"film": 2 * 2 * 4 * 16, "context": 3 * 4},
        "lora": {"context": 3 * 2 * 3 * 2 * 2 * 8},
    }
    for form, counts in expected.items():
        found = made(form).parameter_counts()
        assert found == base | counts | {"total": base["base"] + sum(counts.values())}, form


@pytest.mark.parametrize("form", FORMS)
def test_a_new_file_leaves_the_others_as_they_are(form):
    model = made(form).eval()
    before = model(tokens(), file_ids=FILES)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert model.add_file() == 3
    assert torch.equal(model(tokens(), file_ids=FILES), before)
    batch = {"input": tokens(), "target": tokens(seed=2)}
    if form == "none":
        with pytest.raises(ValueError, match="form none; it must have contexts"):
            adapt_file(model, 3, [batch])
        return
    losses = adapt_file(model, 3, [batch] * 5, lr=0.01)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(t, after[name][: len(t)]) for name, t in state.items())


def test_a_file_that_is_drawn_is_as_those_of_step_0():
    lora = made("lora")
    lora.add_file("normal")
    for A, B in adapters(lora.contexts()[3:], 8, 2):
        assert A.any()
        assert not B.any()
    added = made("added", context_std=0.0)
    added.add_file("normal")
    assert not added.contexts()[3].any()


def test_rank_is_of_bilinear_tensors():
    with pytest.raises(ValueError, match="rank is 2; it must be None for the form film"):
        MultiFileConfig(11, 3, form="film", rank=2, **SIZES)


@pytest.mark.parametrize(
    "form", [form if form in ("none", "lora") else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_a_run_of_every_form_can_be_used(form, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} of these lines is a line\n" * 30)
    run_dir = tmp_path / "run"
    files = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    small = ["--d-model", "8", "--n-heads", "2", "--seq-len", "16", "--context-dim", "4", "--no-compare-einsum"]
    assert main(["train", *files, "--form", form, *small, "--steps", "2", "--run-dir", str(run_dir)]) == 0
    result = json.loads((run_dir / "result.json").read_text())
    assert result["details"]["parameters"] == load_run(run_dir).model.parameter_counts()
    assert main(["generate", str(run_dir), "--file", "one", "--prompt", "one", "--max-new-tokens", "3"]) == 0
    adding = main(["add-file", str(run_dir), files[0], "--name", "more", "--steps", "2"])
    assert adding == (2 if form == "none" else 0)
    assert main(["export", str(run_dir), "--file", "two", "--out", str(tmp_path / "two.pt2")]) == 0
    run = load_run(run_dir)
    program = torch.export.load(tmp_path / "two.pt2").module()
    given = torch.randint(run.tokenizer.vocab_size, (3, 7))
    with torch.no_grad():
        assert_close(program(given), run.model_of(1)(given))
        exact = run.model.double()(given, file_ids=torch.full((3,), 1))
        assert_close(run.model_of(1)(given), exact)

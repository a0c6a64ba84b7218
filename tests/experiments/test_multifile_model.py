import math

import pytest
import torch

import ctxkern
from ctxkern.experiments.core.tokenizers import ByteTokenizer, CharTokenizer
from ctxkern.experiments.multifile.adapt import adapt_file
from ctxkern.experiments.multifile.config import TrainConfig, debug_config
from ctxkern.experiments.multifile.data import Collator, EncodedDataset, MultiFileDataset
from ctxkern.experiments.multifile.generate import generate, generate_text
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.experiments.multifile.train import batch_loss, build_optimizer, criterion, parameter_groups, train_step
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention, KVCache
from ctxkern.nn.block import TransformerBlock

VOCAB = 20


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "context_dim": 4, "seq_len": 12, "init": "hyperfan"}
    return MultiFileTransformer(MultiFileConfig(VOCAB, 3, **sizes | changes))


def make_batch(seed=0, batch=5, length=12):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, VOCAB, (batch, length), generator=rng)
    targets = torch.randint(0, VOCAB, (batch, length), generator=rng)
    padding = torch.arange(length) >= torch.tensor([length, 7, length, 3, 9])[:batch, None]
    targets[padding] = -100
    return {
        "input": inputs,
        "target": targets,
        "file_id": torch.tensor([0, 2, 2, 1, 0])[:batch],
        "padding_mask": padding,
    }


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_near(actual, expected, name="", scale=1e-5):
    error = (actual - expected).abs().max()
    assert error <= scale * (1 + expected.abs().max()), f"{name}: off by {error}"


def test_both_routes_are_equal_with_gradients():
    model, batch = make_model(), make_batch()
    by_context = model(batch["input"], model.get_file_context(batch["file_id"]))
    by_id = model(batch["input"], file_ids=batch["file_id"])
    assert by_id.shape == (5, 12, VOCAB)
    assert_near(by_id, by_context)
    first, second = (gradients(model, criterion(out, batch["target"])) for out in (by_context, by_id))
    for name, gradient in first.items():
        assert_near(second[name], gradient, name)
    # and the context matters
    other = model(batch["input"], file_ids=(batch["file_id"] + 1) % 3)
    assert (other - by_id).abs().max() > 1e-3


def test_a_merged_model_is_called_as_before_and_without_contexts():
    model, batch = make_model().eval(), make_batch()
    merged = ctxkern.merge(model, model.get_file_context(torch.tensor([2])))
    expected = model(batch["input"], file_ids=torch.full((5,), 2))
    assert_near(merged(batch["input"]), expected)
    assert_near(merged(batch["input"], model.get_file_context(batch["file_id"])), expected)
    assert_near(merged(batch["input"], file_ids=batch["file_id"]), expected)


def test_exactly_one_route_is_taken():
    model, batch = make_model(), make_batch()
    contexts = model.get_file_context(batch["file_id"])
    with pytest.raises(ValueError, match="neither contexts nor file_ids is given"):
        model(batch["input"])
    with pytest.raises(ValueError, match="both contexts and file_ids are given"):
        model(batch["input"], contexts, file_ids=batch["file_id"])


BAD_CALLS = {
    "flat": (
        lambda b: ((b["input"][0],), {"file_ids": b["file_id"][:1]}),
        r"inputs has the shape \[12\]; it must be \[B, S\]",
    ),
    "long": (
        lambda b: ((b["input"].repeat(1, 2),), {"file_ids": b["file_id"]}),
        "inputs reaches position 24; it must be at most seq_len = 12",
    ),
    "ids": (
        lambda b: ((b["input"],), {"file_ids": b["file_id"][:2]}),
        r"file_ids has the shape \[2\]; it must be \[B\] = \[5\]",
    ),
    "contexts": (
        lambda b: ((b["input"], torch.zeros(5, 3)), {}),
        r"contexts has the shape \[5, 3\]; it must be \[B, K\] = \[5, 4\]",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_inputs_are_named(name):
    call, message = BAD_CALLS[name]
    args, kwargs = call(make_batch())
    with pytest.raises(ValueError, match=message):
        make_model()(*args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads is 3; it must be a divisor"),
        ({"d_model": 0}, "d_model is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init": "ones"}, "init is 'ones'; it must be one of normal, hyperfan"),
        ({"attention": "flash"}, "attention is 'flash'"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_fused_equals_einsum_with_gradients():
    model, batch = make_model(), make_batch()
    einsum = model.with_attention("einsum")
    assert type(einsum.blocks[0].attention) is EinsumContextModulatedAttention
    assert type(model.blocks[0].attention) is ContextModulatedAttention
    losses = [batch_loss(m, batch) for m in (model, einsum)]
    assert_near(losses[0], losses[1])
    fused, expected = (gradients(m, loss) for m, loss in zip((model, einsum), losses, strict=True))
    for name, gradient in expected.items():
        assert_near(fused[name], gradient, name)


def test_the_model_is_causal_and_ignores_padding():
    model, batch = make_model(), make_batch()
    plain = model(batch["input"], file_ids=batch["file_id"])
    changed = batch["input"].clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB
    later = model(changed, file_ids=batch["file_id"])
    assert_near(later[:, :6], plain[:, :6])
    assert (later[:, 6:] - plain[:, 6:]).abs().max() > 1e-3
    masked = model(batch["input"], file_ids=batch["file_id"], padding_mask=batch["padding_mask"])
    real = ~batch["padding_mask"]
    assert_near(masked[real], plain[real])
    left = torch.zeros(5, 12, dtype=torch.bool)
    left[:, :2] = True
    hidden = model(batch["input"], file_ids=batch["file_id"], padding_mask=left)
    assert (hidden[:, 3:] - plain[:, 3:]).abs().max() > 1e-3


def test_one_step_moves_every_kind_of_parameter():
    model, batch = make_model(), make_batch()
    loss = batch_loss(model, batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    for block in model.blocks:
        for tensor in ("bilinear_q", "bilinear_k", "bilinear_v"):
            assert getattr(block.attention, tensor).grad.abs().max() > 0
    assert (model.context_embeddings.weight.grad.abs().amax(1) > 0).all()


def test_train_step_is_the_documented_one():
    model, batch = make_model(), make_batch()
    expected, reference = make_model(), make_batch()
    loss = train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(loss) is float
    assert math.isfinite(loss)
    reference_loss = batch_loss(expected, reference)
    reference_loss.backward()
    assert loss == pytest.approx(reference_loss.item(), rel=1e-5)
    for (name, moved), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_near(moved, parameter - 0.1 * parameter.grad, name)


def test_debug_config_runs_as_written(tmp_path):
    assert debug_config == {
        "num_files": 2,
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "context_dim": 16,
        "batch_size": 4,
        "seq_len": 32,
        "training_steps": 1,
        "device": "cpu",
    }
    assert TrainConfig.preset("debug") == TrainConfig(**debug_config)
    paths = []
    for name in ("a.txt", "b.txt"):
        paths.append(tmp_path / name)
        paths[-1].write_text(f"the text of {name}, a line of it\n" * 30)
    dataset = MultiFileDataset(paths)
    tokenizer = CharTokenizer.from_texts(dataset.texts())
    data = EncodedDataset(dataset, tokenizer, debug_config["seq_len"])
    batch = Collator(tokenizer, debug_config["seq_len"])([data[i] for i in (0, 1, len(data) - 2, len(data) - 1)])
    assert batch["input"].shape == (4, 32)
    assert set(batch["file_id"].tolist()) == {0, 1}
    config = TrainConfig(**debug_config)
    model = MultiFileTransformer(config.model_config(tokenizer.vocab_size, dataset.num_files))
    optimizer = build_optimizer(model, config)
    for _ in range(debug_config["training_steps"]):
        assert math.isfinite(train_step(model, batch, optimizer))
    for layer in range(2):
        assert model.blocks[layer].attention.bilinear_q.shape == (64, 64, 16)


def test_parameter_counts_are_those_of_the_document():
    model = MultiFileTransformer(MultiFileConfig(10, 2, d_model=64, n_heads=2, n_layers=1, context_dim=16))
    counts = model.parameter_counts()
    assert counts["bilinear"] == 196_608
    assert sum(getattr(model.blocks[0].attention, f"W_{n}_base").weight.numel() for n in "qkv") == 12_288
    assert counts["context"] == 32
    assert counts["total"] == sum(p.numel() for p in model.parameters())


def test_parameter_groups_keep_the_decays_apart():
    model = make_model()
    groups = parameter_groups(model, lr=0.4, weight_decay=0.1, bilinear_weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    attention = model.blocks[0].attention
    assert decay[id(attention.bilinear_k)] == 0.3
    assert decay[id(attention.W_k_base.weight)] == decay[id(model.head.weight)] == 0.1
    assert decay[id(model.context_embeddings.weight)] == decay[id(model.norm.weight)] == 0.0
    shared = parameter_groups(model, lr=0.4, bilinear_lr_scale=0.5, weight_decay=0.1)
    assert {group["weight_decay"] for group in shared} == {0.1, 0.0}
    rates = [{id(p): group["lr"] for group in g for p in group["params"]} for g in (groups, shared)]
    assert [rate[id(attention.bilinear_k)] for rate in rates] == [0.1, 0.2]
    assert [rate[id(model.head.weight)] for rate in rates] == [0.4, 0.4]


def score_spread(init, seed=0, d_model=64, context_dim=16):
    """Standard deviation of attention scores on normalised input: with the context, and of the base alone."""
    torch.manual_seed(seed)
    layer = ContextModulatedAttention(d_model, context_dim, 2, init=init)
    x, contexts = torch.randn(8, 32, d_model), torch.randn(8, context_dim)
    spreads = []
    with torch.no_grad():
        for scale in (1.0, 0.0):
            q, k, _ = layer.qkv(x, contexts * scale, None)
            q, k = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k))
            spreads.append((q @ k.mT / q.shape[-1] ** 0.5).std().item())
    return spreads


@pytest.mark.parametrize("init", ["normal", "hyperfan", "low_rank"])
def test_initial_scores_spread_as_those_of_plain_attention(init):
    modulated, plain = score_spread(init)
    assert 0.8 * plain < modulated < 2.5 * plain


def test_randn_saturates_the_softmax():
    modulated, plain = score_spread("randn")
    assert modulated > 300 * plain
    assert modulated > 100


@pytest.mark.parametrize("init", ["normal", "hyperfan", "low_rank"])
def test_the_first_loss_is_that_of_a_uniform_guess(init):
    model, batch = make_model(init=init), make_batch()
    assert batch_loss(model, batch).item() == pytest.approx(math.log(VOCAB), rel=0.05)


def test_a_model_made_without_memory_starts_like_any_other():
    expected = make_model()
    with torch.device("meta"):
        model = make_model()
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name in ("token_embeddings", "position_embeddings", "context_embeddings", "head"):
        stds = [getattr(m, name).weight.std().item() for m in (model, expected)]
        # the smallest, [3, 4], has a spread of about a fifth
        assert stds[0] == pytest.approx(stds[1], rel=0.2 if name != "context_embeddings" else 1), name


def test_add_file_leaves_the_others_bit_for_bit():
    model, batch = make_model(), make_batch()
    config, before = model.config, {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model(batch["input"], file_ids=batch["file_id"])
    assert model.add_file() == 3
    assert config.num_files == model.context_embeddings.num_embeddings == 4
    weight = model.context_embeddings.weight
    assert weight.requires_grad
    assert torch.equal(weight[:3], before["context_embeddings.weight"])
    assert torch.equal(weight[3], model.contexts()[:3].mean(0))
    for name, value in model.state_dict().items():
        if name != "context_embeddings.weight":
            assert torch.equal(value, before[name])
    assert torch.equal(model(batch["input"], file_ids=batch["file_id"]), outputs)
    assert model.add_file(init=torch.ones(4)) == 4
    assert torch.equal(model.context_embeddings.weight[4], torch.ones(4))
    assert model.add_file(init="normal") == 5
    with pytest.raises(ValueError, match="init is 'zero'; it must be a tensor or one of"):
        model.add_file(init="zero")
    with pytest.raises(ValueError, match=r"init has the shape \[3\]; it must be \[K\] = \[4\]"):
        model.add_file(init=torch.ones(3))


def test_the_callers_config_is_not_changed():
    config = MultiFileConfig(VOCAB, 3, d_model=16, n_heads=2)
    MultiFileTransformer(config).add_file()
    assert config.num_files == 3


@pytest.mark.parametrize(("context_norm", "gain"), [(False, 0.01), (True, 0.005)])
def test_adaptation_touches_only_the_new_vector(context_norm, gain):
    model, batch = make_model(dropout=0.2, context_norm=context_norm), make_batch()
    model.head.weight.requires_grad_(False)
    new = model.add_file()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = adapt_file(model, new, [batch] * 30, lr=0.1)
    assert len(losses) == 30
    # labels are random: a vector of a fixed norm gains less
    assert losses[-1] < losses[0] - gain
    for name, value in model.state_dict().items():
        if name != "context_embeddings.weight":
            assert torch.equal(value, before[name]), name
    weight = model.context_embeddings.weight
    assert torch.equal(weight[:new], before["context_embeddings.weight"][:new])
    assert not torch.equal(weight[new], before["context_embeddings.weight"][new])
    assert model.training
    # what was frozen stays so, and the rest trains on
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="file_id is 9; it must be from 0 to 3"):
        adapt_file(model, 9, [batch])


def test_adaptation_uses_the_new_vector_as_the_model_does():
    model, batch = make_model(), make_batch()
    new = model.add_file("normal")
    losses = adapt_file(model, new, [batch], lr=0.0)
    own = batch | {"file_id": torch.full((5,), new)}
    assert losses[0] == pytest.approx(batch_loss(model, own).item(), rel=1e-5)


def test_generation_with_the_cache_equals_generation_without():
    model = make_model()
    prompts, files = make_batch()["input"][:, :4], torch.tensor([0, 1, 2, 1, 0])
    cached = generate(model, prompts, files, max_new_tokens=20)
    plain = generate(model, prompts, files, max_new_tokens=20, use_cache=False)
    assert cached.shape == (5, 24)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :4], prompts)
    # within the window, the greedy token is the model's likeliest
    logits = model(cached[:, :8], file_ids=files)
    assert torch.equal(logits[:, -1].argmax(-1), cached[:, 8])
    assert model.training


def test_cached_logits_equal_whole_ones():
    model, batch = make_model(), make_batch()
    whole = model(batch["input"], file_ids=batch["file_id"])
    caches, parts = [KVCache() for _ in model.blocks], []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        piece = batch["input"][:, start:stop]
        parts.append(model(piece, file_ids=batch["file_id"], caches=caches, start=start))
    assert_near(torch.cat(parts, 1), whole)


def test_sampling_is_seeded_and_eos_ends():
    model = make_model()
    prompts, files = make_batch()["input"][:, :4], torch.tensor([0, 1, 2, 1, 0])

    def sample(seed):
        rng = torch.Generator().manual_seed(seed)
        return generate(model, prompts, files, max_new_tokens=8, temperature=1.0, generator=rng)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    greedy = generate(model, prompts[:1], files[:1], max_new_tokens=8)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        narrowed = generate(model, prompts[:1], files[:1], max_new_tokens=8, temperature=1.0, **narrow)
        assert torch.equal(narrowed, greedy)
    eos = int(greedy[0, 4])
    assert generate(model, prompts[:1], files[:1], max_new_tokens=8, eos_id=eos).shape == (1, 5)
    with pytest.raises(ValueError, match="temperature is -1; it must be at least 0"):
        generate(model, prompts, files, max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="inputs has the shape"):
        generate(model, prompts[:, :0], files, max_new_tokens=1)


def test_a_trained_model_answers_by_file():
    """The same prompt, answered as each file has it: only the context tells them apart."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    items = [{"input": "q", "target": answer, "file_id": i} for i, answer in enumerate(("yes", "no", "so"))]
    model = MultiFileTransformer(
        MultiFileConfig(tokenizer.vocab_size, 3, d_model=32, n_layers=1, context_dim=4, seq_len=8)
    )
    batch = Collator(tokenizer, 8)(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_step(model, batch, optimizer) for _ in range(80)]
    assert losses[-1] < 0.1
    prompts = ["q", "q", "a longer prompt than the window, q"]
    assert generate_text(model, tokenizer, prompts[:2], [1, 0], max_new_tokens=6) == ["no", "yes"]
    assert len(generate_text(model, tokenizer, prompts, [2, 1, 0], max_new_tokens=3)) == 3
    with pytest.raises(ValueError, match="file_ids has 1 entries"):
        generate_text(model, tokenizer, prompts, [0], max_new_tokens=1)


def test_block_takes_a_context_a_token_and_any_attention():
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 2, attention=EinsumContextModulatedAttention, is_causal=True, init="hyperfan")
    fused = TransformerBlock(16, 4, 2, is_causal=True)
    fused.load_state_dict(block.state_dict())
    x, contexts = torch.randn(3, 5, 16), torch.randn(3, 4)
    per_token = contexts[:, None].expand(3, 5, 4)
    assert_near(fused(x, contexts), block(x, contexts))
    assert_near(fused(x, per_token), block(x, contexts))
    double = TransformerBlock(16, 4, 2, dtype=torch.float64)
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}

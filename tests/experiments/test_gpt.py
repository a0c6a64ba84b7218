"""The character GPT: sizes, start, contexts, and text of any length."""

import math

import pytest
import torch

from ctxkern.experiments.core.generation import generate_tokens
from ctxkern.experiments.gpt.config import GPTConfig, GPTSettings, document
from ctxkern.experiments.gpt.model import GPT
from ctxkern.experiments.gpt.run import generate
from ctxkern.experiments.gpt.train import criterion
from ctxkern.nn import EinsumContextModulatedAttention, KVCache

VOCAB, BLOCK = 20, 8


def make(seed=0, **changes):
    """A small model in float64, in evaluation mode, with weights large enough to tell positions apart."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "block_size": BLOCK, "init_std": 0.3}
    return GPT(GPTConfig(vocab_size=VOCAB, num_files=3, **sizes | changes)).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_the_document_has_its_number_of_parameters():
    config = GPTSettings.preset("document").model_config(65, 1)
    with torch.device("meta"):
        model = GPT(config)
    assert model.parameter_count() == 25_339_969
    assert (config.norm, config.activation, config.dropout, document["lr"]) == ("post", "relu", 0.14, 3e-6)


@pytest.mark.parametrize("changes", [{}, {"norm": "post", "activation": "relu"}, {"context_dim": 4}])
def test_the_first_loss_is_that_of_a_uniform_guess(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, d_model=64, **changes))
    inputs, targets = (torch.randint(0, 65, (16, 64)) for _ in range(2))
    loss = criterion(model(inputs, file_ids=torch.zeros(16, dtype=torch.int64)), targets)
    assert loss.item() == pytest.approx(math.log(65), rel=0.02)


def test_weights_start_with_the_given_spread_and_biases_at_zero():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, context_dim=4, num_files=3))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "bilinear" not in name and "context" not in name:
            # 8,320 entries and more: about six standard deviations
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "post"}, {"norm": "none"}, {"context_dim": 4}, {"rank": 2, "context_dim": 4}]
)
def test_the_model_is_causal_and_its_cache_is_exact(changes):
    model, inputs, files = make(**changes), tokens(3, BLOCK), torch.tensor([2, 0, 2])
    whole = model(inputs, file_ids=files)
    changed = inputs.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCAB
    torch.testing.assert_close(model(changed, file_ids=files)[:, :5], whole[:, :5])
    caches, parts = [KVCache() for _ in model.blocks], []
    for start, stop in ((0, 4), (4, 5), (5, BLOCK)):
        parts.append(model(inputs[:, start:stop], file_ids=files, caches=caches, start=start))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_contexts_modulate_as_the_layer_of_their_own_does():
    model, inputs, files = make(context_dim=4), tokens(3, BLOCK), torch.tensor([2, 0, 2])
    out = model(inputs, file_ids=files)
    torch.testing.assert_close(model(inputs, contexts=model.contexts()[files]), out)
    torch.testing.assert_close(model.contexts().norm(dim=1), torch.full((3,), 2.0).double())
    other = model(inputs, file_ids=torch.tensor([1, 1, 1]))
    assert (other - out).abs().amax((1, 2)).min() > 1e-4
    loss = criterion(out, tokens(3, BLOCK, seed=1))
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "bilinear" in name)
    assert (model.context_embeddings.weight.grad.abs().amax(1) > 0).tolist() == [True, False, True]
    # the same weights in the plain einsum
    for block in model.blocks:
        layer = EinsumContextModulatedAttention(16, 4, 2, is_causal=True, out_bias=True, dtype=torch.float64)
        layer.load_state_dict(block.attention.state_dict())
        block.attention = layer
    torch.testing.assert_close(model(inputs, file_ids=files), out)


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, {"inputs": torch.zeros(3, dtype=torch.int64)}, r"inputs has the shape \[3\]; it must be \[B, S\]"),
        ({}, {"inputs": tokens(1, 9)}, "inputs reaches position 9; it must be at most block_size = 8"),
        ({}, {"inputs": tokens(1, 8), "start": 1}, "inputs reaches position 9"),
        ({"context_dim": 4}, {"inputs": tokens(1, 4)}, "neither file_ids nor contexts is given"),
        ({"context_dim": 4}, {"inputs": tokens(2, 4), "file_ids": torch.tensor([0])}, r"it must be \[B\] = \[2\]"),
        ({"context_dim": 4}, {"inputs": tokens(2, 4), "contexts": torch.ones(2, 3)}, r"it must be \[B, K\] = \[2, 4\]"),
    ],
)
def test_bad_calls_are_named(changes, call, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)(**call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads is 3; it must be a divisor of d_model = 16"),
        ({"rank": 2}, "rank is 2; it must be None without contexts"),
        ({"norm": "rms"}, "norm is 'rms'; it must be one of pre, post, none"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def cropped(model, inputs, count):
    """Greedy text as it is first written: all of the last characters at every step."""
    for _ in range(count):
        logits = model(inputs[:, -BLOCK:])
        inputs = torch.cat([inputs, logits[:, -1:].argmax(-1)], 1)
    return inputs


@pytest.mark.parametrize("length", [1, 5, BLOCK, 13])
def test_text_goes_on_past_the_block_size(length):
    model, prompts = make(), tokens(4, length)
    greedy = {"max_new_tokens": 30, "temperature": 0.0}
    out = generate(model, prompts, **greedy)
    assert torch.equal(out, generate(model, prompts, use_cache=False, **greedy))
    # a window that moves by one is what everyone writes
    expected = cropped(model, prompts, 30)
    assert torch.equal(generate(model, prompts, keep=BLOCK, **greedy), expected)
    # and all are alike as long as everything fits
    whole = max(0, BLOCK + 1 - length)
    assert torch.equal(out[:, : length + whole], expected[:, : length + whole])


@pytest.mark.parametrize("keep", [1, 3, BLOCK - 1])
def test_a_window_that_is_read_again_begins_at_position_0(keep):
    model, prompts = make(), tokens(2, BLOCK)
    out = generate(model, prompts, max_new_tokens=2, temperature=0.0, keep=keep)
    # the second new character is chosen by the last ones alone
    expected = model(out[:, BLOCK + 1 - keep : BLOCK + 1])[:, -1].argmax(-1)
    assert torch.equal(out[:, -1], expected)
    # where they stand matters to this model
    moved = model(out[:, BLOCK - keep : BLOCK + 1])[:, -1]
    assert not torch.allclose(moved, model(out[:, BLOCK + 1 - keep : BLOCK + 1])[:, -1])


def test_generation_drops_nothing_and_leaves_the_mode():
    model, prompts = make(dropout=0.5).train(), tokens(2, 3)
    first, second = (generate(model, prompts, max_new_tokens=12, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert torch.equal(first, generate(model.eval(), prompts, max_new_tokens=12, temperature=0.0))
    assert not model.training


def test_sampling_is_seeded_and_may_be_narrowed():
    model, prompts = make(), tokens(2, 3)

    def sample(seed=0, **how):
        rng = torch.Generator().manual_seed(seed)
        return generate(model, prompts, max_new_tokens=20, generator=rng, **how)

    assert torch.equal(sample(), sample())
    assert not torch.equal(sample(), sample(1))
    assert torch.equal(sample(), sample(use_cache=False))
    greedy = sample(temperature=0.0)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert torch.equal(sample(**narrow), greedy)
    with pytest.raises(ValueError, match="keep is 9; it must be from 1 to seq_len = 8, or None"):
        generate_tokens(None, prompts, num_layers=1, seq_len=8, max_new_tokens=1, keep=9)


def test_generation_is_in_the_context_that_is_asked_for():
    model, prompts = make(context_dim=4), tokens(1, 3).expand(2, 3)
    out = generate(model, prompts, max_new_tokens=12, temperature=0.0, contexts=model.contexts()[[0, 1]])
    for row in (0, 1):
        alone = generate(model, prompts[:1], max_new_tokens=12, temperature=0.0, contexts=model.contexts()[[row]])
        assert torch.equal(out[row : row + 1], alone)
    assert not torch.equal(out[0], out[1])

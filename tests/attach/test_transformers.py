"""Models of transformers with contexts and adapters: generation in a mixed batch, checkpointing, training."""

import copy
import math

import pytest
import torch
from torch import nn

import ctxkern

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

K, N, R, VOCABULARY = 4, 3, 2, 40
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "*.mlp.*_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def new_model(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **sizes,
        )
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture(params=["contexts", "adapters"])
def attached(request, kind):
    """(model, arguments of `use` for rows of a table of N)."""
    model = new_model(kind)
    if request.param == "contexts":
        names = ctxkern.attach_contexts(model, K, TARGETS[kind])
        table = torch.randn(N, K)
        how = lambda index: {"context": table, "context_index": index}  # noqa: E731
    else:
        names = ctxkern.attach_adapters(model, N, R, TARGETS[kind])
        how = lambda index: {"adapter_index": index}  # noqa: E731
    assert len(names) == {"llama": 14, "gpt2": 8}[kind]
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    return model, how


PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 4], [11, 5, 30, 8]])
GENERATION = {
    "greedy": {"do_sample": False},
    "no-cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several-of-beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATION.values(), ids=GENERATION)
def test_a_mixed_batch_generates_as_one_by_one(attached, how):
    model, of = attached
    index = torch.tensor([2, 0, 1])
    with ctxkern.use(model, **of(index)):
        mixed = model.generate(PROMPTS, max_new_tokens=6, **how)
    alone = []
    for i in range(len(PROMPTS)):
        with ctxkern.use(model, **of(index[i : i + 1])):
            alone.append(model.generate(PROMPTS[i : i + 1], max_new_tokens=6, **how))
    assert torch.equal(mixed, torch.cat(alone))
    with ctxkern.use(model, **of(index.roll(1))):
        assert not torch.equal(model.generate(PROMPTS, max_new_tokens=6, **how), mixed)


@pytest.mark.parametrize("how", ["greedy", "beams", "several-of-beams"])
def test_kept_weights_generate_the_same(kind, how):
    model, table, index = new_model(kind), torch.randn(N, K), torch.tensor([2, 0, 1])
    layers = len(ctxkern.attach_contexts(model, K, TARGETS[kind]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    with ctxkern.use(model, context=table, context_index=index):
        want = model.generate(PROMPTS, max_new_tokens=6, **GENERATION[how])
        with ctxkern.cache_weights(model) as cache:
            assert torch.equal(model.generate(PROMPTS, max_new_tokens=6, **GENERATION[how]), want)
            counts = cache.stats()
    assert (counts.misses, counts.uncached) == (N * layers, 0)
    assert counts.hits == 5 * N * layers


def test_several_samples_of_each_sequence(attached):
    model, of = attached
    with ctxkern.use(model, **of(torch.tensor([2, 0, 1]))):
        torch.manual_seed(0)
        found = model.generate(PROMPTS, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert found.shape == (6, 8)
    assert torch.equal(found[::2, :4], PROMPTS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(attached, reentrant):
    model, of = attached
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.enable_input_require_grads()
    index = torch.tensor([2, 0, 1])
    for each in (model, other):
        losses = []
        for rows in (index, index.roll(1)):
            with ctxkern.use(each, **of(rows)):
                losses.append(each(PROMPTS, labels=PROMPTS).loss)
        sum(losses).backward()
    got, want = ([p.grad for p in m.parameters() if p.requires_grad] for m in (other, model))
    assert len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bank_learns_what_one_adapter_cannot(kind):
    """Each adapter its own next token, in mixed batches on a frozen base."""
    model = new_model(kind)
    ctxkern.attach_adapters(model, N, R, TARGETS[kind])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    index = torch.arange(N)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    labels = torch.where(PROMPTS > 0, (index * 7 + 3)[:, None], 0)
    same = PROMPTS[:1].expand(N, -1)
    for _ in range(200):
        with ctxkern.use(model, adapter_index=index):
            loss = model(same, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # what one adapter for all could reach at best is log N
    assert loss < math.log(N) / 2
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    with ctxkern.use(model, adapter_index=index):
        assert torch.equal(model(same).logits[:, :-1].argmax(-1), labels[:, 1:])

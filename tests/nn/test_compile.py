"""Modules compiled, exported and traced: no graph breaks, few graphs for many sizes, the same numbers."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import ctxkern
from ctxkern.experiments.multifile.model import MultiFileConfig, MultiFileTransformer
from ctxkern.nn import ContextModulatedAttention, EinsumContextModulatedAttention, KVCache

D, K, FILES, VOCAB = 8, 3, 4, 11
LENGTHS = (5, 6, 7, 9, 12, 17, 23, 31)
# (B, S, F)
SIZES = ((4, 5, 3), (5, 7, 4), (3, 9, 6), (6, 4, 2))


class Files(nn.Module):
    """A whole transformer as a function of tokens [B, S] and a table of contexts [F, K], rows picked by an index."""

    def __init__(self, attention):
        super().__init__()
        sizes = {"d_model": D, "n_heads": 2, "n_layers": 2, "context_dim": K, "seq_len": 64}
        self.model = MultiFileTransformer(MultiFileConfig(VOCAB, FILES, attention=attention, **sizes))

    def forward(self, x, context, context_index):
        return self.model(x, context[context_index])


def attention(cls, **how):
    return cls(D, K, 4, n_kv_heads=2, bias=True, **how)


MODELS = {
    "fused": lambda causal: attention(ContextModulatedAttention, is_causal=causal),
    "einsum": lambda causal: attention(EinsumContextModulatedAttention, is_causal=causal),
    "merged": lambda causal: ctxkern.merge(attention(ContextModulatedAttention, is_causal=causal), torch.randn(K)),
    "whole-fused": lambda causal: Files("fused"),
    "whole-einsum": lambda causal: Files("einsum"),
}
KINDS = [(name, causal) for name in MODELS for causal in (True, False) if causal or not name.startswith("whole")]


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind[0]](kind[1]).eval()


def inputs(model, B, S, F):
    """(x, context), {context_index}: what a call of the model takes."""
    generator = torch.Generator().manual_seed(B + 100 * S)
    if isinstance(model, Files):
        x = torch.randint(VOCAB, (B, S), generator=generator)
    else:
        x = torch.randn(B, S, D, generator=generator)
    index = torch.randint(F, (B,), generator=generator)
    return (x, torch.randn(F, K, generator=generator)), {"context_index": index}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train_step(layer, x, context, **how):
    layer.zero_grad()
    y = layer(x, context, **how)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_many_lengths_compile_at_most_twice(kind):
    model = made(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for S in LENGTHS:
        args, how = inputs(model, 4, S, 3)
        torch.testing.assert_close(compiled(*args, **how), model(*args, **how))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] != "whole-einsum"], ids=str)
def test_training_with_many_sizes_compiles_at_most_twice(kind):
    model = made(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in SIZES:
        args, how = inputs(model, *size)
        torch.testing.assert_close(train_step(compiled, *args, **how), train_step(model, *args, **how))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", [k for k in KINDS if not k[0].startswith("whole")], ids=str)
def test_masks_and_many_sizes(kind):
    model = made(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for B, S, F in SIZES:
        args, how = inputs(model, B, S, F)
        how["key_padding_mask"] = torch.arange(S) >= torch.arange(1, B + 1)[:, None]
        how["attn_mask"] = torch.linspace(-1, 1, S * S).view(S, S)
        torch.testing.assert_close(compiled(*args, **how), model(*args, **how))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("max_length", [None, 64])
def test_decoding_with_a_cache_compiles_few_graphs(max_length):
    model = made(("fused", True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    caches = KVCache(max_length), KVCache(max_length)
    with torch.no_grad():
        for step in range(50):
            (x, context), _ = inputs(model, 2, 4 if step == 0 else 1, 2)
            got, want = (layer(x, context, cache=c) for layer, c in zip((compiled, model), caches, strict=True))
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(caches[0].k, caches[1].k)
    # the prompt, the first token, tokens of any number before them, a buffer that is full
    assert counters["stats"]["unique_graphs"] <= 6


def test_under_autocast():
    layer = ContextModulatedAttention(8, 3, 2)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3)

    def step(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return train_step(layer, x, context)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(step(compiled), step(layer), strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_inductor(kind):
    model = made(kind)
    compiled = torch.compile(model, fullgraph=True)
    for size in SIZES:
        args, how = inputs(model, *size)
        torch.testing.assert_close(train_step(compiled, *args, **how), train_step(model, *args, **how))
    assert counters["stats"]["unique_graphs"] <= 2


def test_swapped_after_it_was_compiled():
    model = nn.Sequential(made(("einsum", True)))
    (x, context), how = inputs(model, *SIZES[0])
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    before = compiled(x, context, **how)
    assert ctxkern.swap(model) == ["0"]
    torch.testing.assert_close(compiled(x, context, **how), before)


def exported(model, args, how, strict=False):
    longest = model.model.config.seq_len if isinstance(model, Files) else None
    B, S, F = (torch.export.Dim(name, min=1, max=longest if name == "S" else None) for name in "BSF")
    shapes = {"x": {0: B, 1: S}, "context": {0: F}, "context_index": {0: B}}
    return torch.export.export(model, args, how, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "traced"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_export_with_other_sizes(kind, strict):
    model = made(kind)
    program = exported(model, *inputs(model, *SIZES[0]), strict)
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("ctxkern.modulated_forward" in graph.code for graph in graphs) == ("fused" in kind[0])
    for size in (*SIZES, (1, 1, 1), (2, 1, 3), (1, 8, 2)):
        args, how = inputs(model, *size)
        torch.testing.assert_close(program.module()(*args, **how), model(*args, **how))


@pytest.mark.parametrize("per_token", [False, True], ids=["a-context-per-sequence", "a-context-per-token"])
@pytest.mark.parametrize("kind", [("fused", True), ("einsum", True)], ids=str)
def test_export_of_contexts_without_an_index(kind, per_token):
    model = made(kind)
    B, S = (torch.export.Dim(name, min=2) for name in "BS")
    shapes = {"x": {0: B, 1: S}, "context": {0: B, 1: S} if per_token else {0: B}}

    def example(b, s):
        return torch.randn(b, s, D), torch.randn((b, s, K) if per_token else (b, K))

    program = torch.export.export(model, example(4, 5), dynamic_shapes=shapes)
    for size in ((2, 9), (6, 3)):
        args = example(*size)
        torch.testing.assert_close(program.module()(*args), model(*args))


LOADER = """
import sys
import torch
import ctxkern  # registers the operators
from ctxkern.testing.oracle import assert_matches

run = torch._inductor.aoti_load_package(sys.argv[1])
for args, how, exact, einsum in torch.load(sys.argv[2]):
    assert_matches({"y": run(*args, **how)}, {"y": exact}, {"y": einsum})
"""


def einsum_of(kind, model):
    """The einsum model with the parameters of a model; a merged one is in plain torch already."""
    twin = MODELS[kind[0].replace("fused", "einsum")](kind[1]).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def wide(t):
    return t.double() if t.is_floating_point() else t


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k[1]], ids=str)
def test_an_inductor_package_in_another_process(kind, tmp_path):
    model, examples = made(kind), []
    einsum, exact = einsum_of(kind, model), einsum_of(kind, model).double()
    with torch.no_grad():
        for size in SIZES:
            args, how = inputs(model, *size)
            examples.append((args, how, exact(*map(wide, args), **how), einsum(*args, **how)))
        program = exported(model, *examples[0][:2])
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "examples.pt")]
    torch._inductor.aoti_compile_and_package(program, package_path=files[0])
    torch.save(examples, files[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, *files], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] in ("fused", "einsum", "merged")], ids=str)
def test_jit_trace(kind):
    model = made(kind)
    (x, context), how = inputs(model, *SIZES[0])
    traced = torch.jit.trace(model, (x, context[how["context_index"]]))
    (x, context), how = inputs(model, *SIZES[1])
    args = x, context[how["context_index"]]
    torch.testing.assert_close(traced(*args), model(*args))

"""Contexts and adapters attached to the layers of a model: which ones, what they compute, what a forward uses."""

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctxkern
from ctxkern.attach import using
from ctxkern.reference import lora_linear_ref, modulated_linear_ref
from ctxkern.testing.oracle import assert_matches

B, S, D, K, N, R = 4, 5, 8, 6, 3, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head, with checkpoints where `how` is given."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head, self.how = nn.ModuleList([Block(), Block()]), nn.Linear(D, 3), None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, **self.how)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def with_contexts(model, **how):
    ctxkern.attach_contexts(model, K, ["up", "down"], **how)
    randomise(model)
    return model


def with_adapters(model, **how):
    ctxkern.attach_adapters(model, N, R, ["up", "down"], **how)
    randomise(model)
    return model


def randomise(model):
    """What was added, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("blocks.0.up", ["blocks.0.up"]),
        ("up", ["blocks.0.up", "blocks.1.up"]),
        (["1.down", "head"], ["blocks.1.down", "head"]),
        ("blocks.*", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (re.compile(r"blocks\.\d\.(up|down)"), ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (lambda name, layer: layer.out_features == 3, ["head"]),
    ],
)
def test_targets(model, targets, names):
    assert ctxkern.attach_contexts(copy.deepcopy(model), K, targets) == names
    assert ctxkern.attach_adapters(model, N, R, targets) == names


def test_layers_that_cannot_be_attached_to(model):
    before = {name: type(module) for name, module in model.named_modules()}
    cases = [
        ("q_proj", "targets has 'q_proj', which means no layer; linear layers of this model are called down, head, up"),
        ("act", "targets has 'act', which means 'blocks.0.act', a GELU; it must mean an nn.Linear"),
        (["up", "nothing"], "'nothing', which means no layer"),
    ]
    for targets, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            ctxkern.attach_contexts(model, K, targets)
    assert before == {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match="targets has a int; it must hold names, globs"):
        ctxkern.attach_contexts(model, K, [3])
    with pytest.raises(TypeError, match="model is a function; it must be a torch.nn.Module"):
        ctxkern.attach_contexts(lambda x: x, K, "up")
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        ctxkern.attach_adapters(model, N, 0, "up")
    with pytest.raises(TypeError, match="context_dim is a float; it must be an int"):
        ctxkern.attach_contexts(model, 6.0, "up")
    ctxkern.attach_contexts(model, K, "up")
    with pytest.raises(ValueError, match=r"'blocks.0.up' is attached already, as a ContextLinear"):
        ctxkern.attach_adapters(model, N, R, "up")
    model.blocks[1].down.weight = model.blocks[0].down.weight
    with pytest.raises(ValueError, match=r"'blocks.0.down' shares its weight with 'blocks.1.down'"):
        ctxkern.attach_adapters(model, N, R, "down")
    model.blocks[1].down = model.blocks[0].down
    with pytest.raises(ValueError, match=r"'blocks.0.down' is 'blocks.1.down' too"):
        ctxkern.attach_adapters(model, N, R, "down")
    quantised = nn.Sequential(type("Linear8bit", (nn.Linear,), {})(4, 4))
    with pytest.raises(ValueError, match="is a Linear8bit; it must be exactly an nn.Linear or a Conv1D"):
        ctxkern.attach_adapters(quantised, N, R, "0")
    whole = nn.Sequential(nn.Linear(4, 4))
    whole[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="has a weight of torch.int8; it must be of floats"):
        ctxkern.attach_adapters(whole, N, R, "0")
    parametrized = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="is a ParametrizedLinear; it must be exactly"):
        ctxkern.attach_adapters(parametrized, N, R, "0")
    own = nn.Sequential(nn.Linear(4, 4))
    own[0].forward = lambda x: x
    with pytest.raises(ValueError, match="has a forward of its own"):
        ctxkern.attach_adapters(own, N, R, "0")


def test_the_model_stays_what_it_was(model):
    x, weight, keys = torch.randn(B, S, D), model.blocks[0].up.weight, set(model.state_dict())
    want = model(x)
    with_hook = []
    model.blocks[0].up.register_forward_hook(lambda *_: with_hook.append(1))
    ctxkern.attach_contexts(model, K, "up")
    ctxkern.attach_adapters(model, N, R, "down", alpha=4)
    assert model.blocks[0].up.weight is weight
    assert keys < set(model.state_dict())
    assert isinstance(model.blocks[0].up, nn.Linear)
    with ctxkern.use(model):
        assert torch.equal(model(x), want)
    with ctxkern.use(model, adapter_index=torch.tensor([0, 2, -1, 1])):
        assert torch.equal(model(x), want)
    with ctxkern.use(model, context=torch.randn(B, K)):
        torch.testing.assert_close(model(x), want)
    assert len(with_hook) == 3
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up.bilinear", "down.lora_A", "down.lora_B")}
    with pytest.raises(RuntimeError, match=r"'blocks.0.up' is attached and nothing is in use"):
        model(x)
    ctxkern.detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(x), want)
    assert all(type(m) is not nn.Linear or m.weight.dtype is torch.float32 for m in model.modules())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(B, S, D), (B, D), (B, 2, S, D)])
def test_contexts_compute_the_modulated_map(rank, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 7))
    ctxkern.attach_contexts(model, K, "0", rank=rank, freeze=False)
    randomise(model)
    layer, x, table, index = model[0], torch.randn(shape), torch.randn(3, K), torch.tensor([2, 0, 0, 1])
    bilinear = layer.bilinear if rank is None else layer.bilinear.tensor()
    leaves = [x, table, layer.weight, layer.bias]
    values, exact = (
        [t.detach().to(dtype).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.float64)
    )

    def einsum(x, table, weight, bias):
        tensor = bilinear.detach().to(x.dtype)
        flat = x.reshape(B, -1, D)
        return modulated_linear_ref(flat, table, weight.mT, tensor, bias, context_index=index).view(*shape[:-1], 7)

    def attached(x, table, weight, bias):
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        with ctxkern.use(model, context=table, context_index=index):
            return model(x)

    dy = torch.randn(*shape[:-1], 7)
    found = {}
    for name, fn, given in (("got", attached, values), ("einsum", einsum, values), ("exact", einsum, exact)):
        y = fn(*given)
        dx, dtable = torch.autograd.grad(y, given[:2], dy.to(y.dtype))
        found[name] = {"y": y.detach(), "dx": dx, "dtable": dtable}
    assert_matches(found["got"], found["exact"], found["einsum"])


def test_adapters_compute_the_low_rank_map():
    torch.manual_seed(0)
    model, index = nn.Sequential(nn.Linear(D, 7)), torch.tensor([2, -1, 0, 2])
    ctxkern.attach_adapters(model, N, R, "0", alpha=5)
    randomise(model)
    layer, x, dy = model[0], torch.randn(B, S, D), torch.randn(B, S, 7)
    with ctxkern.use(model, adapter_index=index):
        y = model(x)
    got = {"y": y, **dict(zip("AB", torch.autograd.grad(y, (layer.lora_A, layer.lora_B), dy), strict=True))}
    found = []
    for dtype in (torch.float64, torch.float32):
        x_, w, a, b, bias = (
            t.detach().to(dtype).requires_grad_() for t in (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)
        )
        y = lora_linear_ref(x_, w, a, b, 5 / R, bias, adapter_index=index)
        found.append({"y": y, **dict(zip("AB", torch.autograd.grad(y, (a, b), dy.to(dtype)), strict=True))})
    assert_matches(*({n: t.detach() for n, t in each.items()} for each in (got, *found)))


def test_weights_of_a_hypernetwork(model):
    ctxkern.attach_adapters(model, 0, R, ["up", "head"], alpha=4)
    A, weights = torch.randn(B, R, D, requires_grad=True), torch.randn(B, 2 * D, R, requires_grad=True)
    x = torch.randn(B, S, D)
    with ctxkern.use(model, lora={"blocks.1.up": (A, weights)}):
        y = model(x)
    with ctxkern.use(model):
        first = model.blocks[0](x)
        want = first + model.blocks[1].down(
            nn.functional.gelu(model.blocks[1].up(first) + (first @ A.mT) @ weights.mT * 2)
        )
        torch.testing.assert_close(y, model.head(want))
    assert all(t is not None for t in torch.autograd.grad(y.sum(), (A, weights)))
    with pytest.raises(ValueError, match="lora has 'up'; it must name attached layers, as 'blocks.0.up'"):
        ctxkern.use(model, lora={"up": (A, weights)})


def test_packed_sequences_are_those_of_a_padded_batch(model):
    with_contexts(model)
    x, table = torch.randn(2, 3, D), torch.randn(2, K)
    with ctxkern.use(model, context=table):
        want = model(x)
    with ctxkern.use(model, context=table, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)):
        torch.testing.assert_close(model(x.view(1, 6, D)), want.view(1, 6, 3))


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_rows_follow_a_batch_that_was_expanded(model, attach):
    attach(model)
    x, index = torch.randn(B, S, D), torch.tensor([1, 0, 2, 1])
    how = {"context": torch.randn(N, K), "context_index": index}
    how = how if attach is with_contexts else {"adapter_index": index}
    with ctxkern.use(model, **how):
        torch.testing.assert_close(model(x.repeat_interleave(3, 0)), model(x).repeat_interleave(3, 0))


def test_blocks_nest_and_end(model):
    with_contexts(model)
    x, first, second = torch.randn(B, S, D), torch.randn(B, K), torch.randn(B, K)
    with ctxkern.use(model, context=first) as used:
        one = model(x)
        with ctxkern.use(model, context=second):
            two = model(x)
            with used:
                assert torch.equal(model(x), one)
            assert torch.equal(model(x), two)
        assert torch.equal(model(x), one)
        with pytest.raises(KeyError), ctxkern.use(model, context=second):
            raise KeyError
        assert torch.equal(model(x), one)
    assert not torch.equal(one, two)
    with pytest.raises(RuntimeError, match="nothing is in use"):
        model(x)
    with pytest.raises(ValueError, match="model has no attached layer"):
        ctxkern.use(Model(), context=first)


def test_threads_have_their_own(model):
    with_contexts(model)
    x, tables, barrier = torch.randn(B, S, D), torch.randn(4, B, K), threading.Barrier(4)
    found = [None] * 4

    def run(i):
        with ctxkern.use(model, context=tables[i]), torch.no_grad():
            barrier.wait()
            found[i] = [model(x) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        with ctxkern.use(model, context=tables[i]), torch.no_grad():
            assert all(torch.equal(y, model(x)) for y in found[i])


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpoints_use_what_their_forward_used(model, how, attach):
    """Two forwards under different contexts, then their backward: outside of both blocks, on another thread, and in a
    block with yet other contexts."""
    attach(model)
    x = torch.randn(B, S, D, requires_grad=True)
    if attach is with_contexts:
        each = [{"context": torch.randn(B, K, requires_grad=True)} for _ in range(2)]
        tables = [used["context"] for used in each]
    else:
        each, tables = [{"adapter_index": torch.tensor(rows)} for rows in ([0, 1, -1, 2], [2, 2, 0, 1])], []

    other = {name: t.detach().roll(1, 0) for name, t in each[0].items()}

    def step(where):
        for t in (x, *tables):
            t.grad = None
        model.zero_grad()
        losses = []
        for used in each:
            with ctxkern.use(model, **used):
                losses.append(model(x).square().sum())
        loss = losses[0] + 2 * losses[1]
        if where == "on a thread":
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        elif where == "in a block":
            with ctxkern.use(model, **other):
                loss.backward()
        else:
            loss.backward()
        return gradients(model) + [t.grad.clone() for t in (x, *tables)]

    want = step("outside")
    model.how = how
    for where in ("outside", "on a thread", "in a block"):
        got = step(where)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_that_remembers_nothing_is_noticed(model, reentrant, monkeypatch):
    monkeypatch.setattr(using, "_bound", lambda function: function)
    with_contexts(model)
    model.how = {"use_reentrant": reentrant}
    with ctxkern.use(model, context=torch.randn(B, K)):
        loss = model(torch.randn(B, S, D, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="nothing is in use"):
        loss.backward()


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_compiles_once_for_all_values(model, attach):
    attach(model)
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(B, S, D)
    for seed in range(4):
        torch.manual_seed(seed)
        index = torch.randint(N, (B,))
        how = {"context": torch.randn(N, K), "context_index": index}
        how = how if attach is with_contexts else {"adapter_index": index}
        with ctxkern.use(compiled, **how):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("rank", [None, 2])
def test_detached_with_a_context(model, rank):
    with_contexts(model, rank=rank)
    x, context = torch.randn(B, S, D), torch.randn(K)
    with ctxkern.use(model, context=context.expand(B, K)):
        want = model(x)
    weight = model.blocks[0].up.weight
    kept = weight.clone()
    with pytest.raises(ValueError, match=r"context has shape \[5\]; layer 'blocks.0.up' needs \[6\]"):
        ctxkern.detach(model, context=torch.randn(5))
    assert ctxkern.detach(model, context=context) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    torch.testing.assert_close(model(x), want)
    assert all(type(m) is nn.Linear for m in (model.blocks[0].up, model.blocks[1].down))
    assert torch.equal(weight, kept)
    with pytest.raises(ValueError, match="no attached layer"):
        ctxkern.detach(model)


def test_detached_with_an_adapter(model):
    with_adapters(model, alpha=4)
    x = torch.randn(B, S, D)
    with ctxkern.use(model, adapter_index=torch.full((B,), 2)):
        want = model(x)
    with pytest.raises(ValueError, match="adapter is 3; layer 'blocks.0.up' has adapters 0 to 2"):
        ctxkern.detach(model, adapter=3)
    with pytest.raises(ValueError, match="context is given and no layer has one"):
        ctxkern.detach(model, context=torch.randn(K))
    ctxkern.detach(model, adapter=2)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_use_their_own(model, again):
    with_contexts(model)
    other = again(model)
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    with ctxkern.use(other, context=table):
        y = other(x)
        with pytest.raises(RuntimeError, match="nothing is in use"):
            model(x)
    with ctxkern.use(model, context=table):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("attach", [with_contexts, with_adapters, lambda m: with_contexts(m, rank=2)])
def test_files(model, attach, tmp_path):
    pytest.importorskip("safetensors")
    plain = copy.deepcopy(model)
    attach(model)
    ctxkern.save_attached(model, tmp_path / "new" / "folder")
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert ctxkern.load_attached(plain, tmp_path / "new" / "folder") == names
    x = torch.randn(B, S, D)
    how = (
        {"context": torch.randn(B, K)}
        if hasattr(model.blocks[0].up, "bilinear")
        else {"adapter_index": torch.arange(4) - 1}
    )
    with ctxkern.use(model, **how), ctxkern.use(plain, **how):
        assert torch.equal(plain(x), model(x))
    # into one that has it attached already
    randomise(plain)
    ctxkern.load_attached(plain, tmp_path / "new" / "folder")
    with ctxkern.use(model, **how), ctxkern.use(plain, **how):
        assert torch.equal(plain(x), model(x))
    base_bytes = sum(p.nbytes for p in Model().parameters())
    added = sum(t.nbytes for n, t in model.state_dict().items() if n not in Model().state_dict())
    size = (tmp_path / "new" / "folder" / "attached.safetensors").stat().st_size
    assert added <= size < added + base_bytes + 2000


def test_files_that_do_not_fit(model, tmp_path):
    pytest.importorskip("safetensors")
    with_contexts(model)
    ctxkern.save_attached(model, tmp_path)
    other = nn.Sequential(nn.Linear(D, D))
    with pytest.raises(ValueError, match="the files have layer 'blocks.0.up'; the model has no linear layer"):
        ctxkern.load_attached(other, tmp_path)
    wide = Model()
    wide.blocks[1].down = nn.Linear(2 * D, D + 1)
    with pytest.raises(ValueError, match=r"'blocks.1.down' has a weight of \[9, 16\]; the files are for \[8, 16\]"):
        ctxkern.load_attached(wide, tmp_path)
    assert type(wide.blocks[0].up) is nn.Linear
    adapters = with_adapters(Model())
    with pytest.raises(ValueError, match="'kind': 'adapters'.* attached; the files have .*'kind': 'contexts'"):
        ctxkern.load_attached(adapters, tmp_path)
    text = (tmp_path / "attached.json").read_text()
    (tmp_path / "attached.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="attached.json has version 7; it must be 1"):
        ctxkern.load_attached(Model(), tmp_path)
    with pytest.raises(FileNotFoundError):
        ctxkern.load_attached(Model(), tmp_path / "nowhere")


def test_a_bank_trains_in_one_step_as_each_adapter_alone(model):
    with_adapters(model)
    x = torch.randn(N, S, D)
    with ctxkern.use(model, adapter_index=torch.arange(N)):
        model(x).square().sum().backward()
    mixed = gradients(model)
    model.zero_grad()
    for i in range(N):
        with ctxkern.use(model, adapter_index=torch.tensor([i])):
            model(x[i : i + 1]).square().sum().backward()
    for a, b in zip(mixed, gradients(model), strict=True):
        torch.testing.assert_close(a, b)

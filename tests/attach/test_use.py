"""What a forward of an attached model uses: blocks, threads, expanded batches, checkpoints, compilers, copies."""

import copy
import pickle
import threading

import pytest
import torch
from helpers.attached import B, D, K, Model, N, S, gradients, new_model, randomise, with_adapters, with_contexts

import ctxkern
from ctxkern.attach import using


@pytest.fixture
def model():
    return new_model()


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_rows_follow_a_batch_that_was_expanded(model, attach):
    attach(model)
    x, index = torch.randn(B, S, D), torch.tensor([1, 0, 2, 1])
    how = {"context": torch.randn(N, K), "context_index": index}
    how = how if attach is with_contexts else {"adapter_index": index}
    with ctxkern.use(model, **how):
        torch.testing.assert_close(model(x.repeat_interleave(3, 0)), model(x).repeat_interleave(3, 0))


def test_packed_sequences_are_those_of_a_padded_batch(model):
    with_contexts(model)
    x, table = torch.randn(2, 3, D), torch.randn(2, K)
    with ctxkern.use(model, context=table):
        want = model(x)
    with ctxkern.use(model, context=table, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)):
        torch.testing.assert_close(model(x.view(1, 6, D)), want.view(1, 6, 3))


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


@pytest.mark.parametrize(("attach", "dropout"), [(with_contexts, 0.0), (with_adapters, 0.0), (with_adapters, 0.5)])
def test_compiles_once_for_all_values(model, attach, dropout):
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
        with ctxkern.use(compiled, **how, dropout=dropout):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("attach", [with_contexts, with_adapters])
def test_compiles_with_checkpoints(model, attach):
    attach(model)
    x, index = torch.randn(B, S, D), torch.tensor([1, 0, 2, 1])
    how = {"context": torch.randn(N, K), "context_index": index}
    how = how if attach is with_contexts else {"adapter_index": index}
    found = []
    for checkpoints, fn in ((None, model), ({"use_reentrant": False}, torch.compile(model, backend="aot_eager"))):
        model.how = checkpoints
        model.zero_grad()
        with ctxkern.use(model, **how):
            loss = fn(x).square().sum()
        loss.backward()
        found.append(gradients(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


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


def test_a_batch_that_no_expansion_makes(model):
    with_adapters(model)
    with ctxkern.use(model, adapter_index=torch.tensor([0, 1, 2])), pytest.raises(ValueError, match="adapter_index"):
        model(torch.randn(B, S, D))


def test_parts_that_were_attached_to_alone(model):
    for block in model.blocks:
        ctxkern.attach_contexts(block, K, "up")
    randomise(model)
    x, table = torch.randn(B, S, D), torch.randn(B, K)
    with ctxkern.use(model, context=table):
        y = model(x)
    with ctxkern.use(model.blocks[0], context=table), ctxkern.use(model.blocks[1], context=table):
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="two layers were attached as 'up'"):
        ctxkern.detach(model)
    for block in model.blocks:
        assert ctxkern.detach(block) == ["up"]


def test_dropout_hides_inputs_of_adapters(model):
    """Each layer sees a mask of one seed, which the reference makes; dropout 0 is no dropout, bit for bit."""
    plain = torch.nn.Linear(D, 3).double()
    lora = {"0": (torch.randn(B, 2, D, dtype=torch.float64), torch.randn(B, 3, 2, dtype=torch.float64))}
    layer = torch.nn.Sequential(plain)
    ctxkern.attach_adapters(layer, 0, 2, ["0"], alpha=2)
    x = torch.randn(B, S, D, dtype=torch.float64)
    with ctxkern.use(layer, lora=lora):
        without = layer(x)
    with ctxkern.use(layer, lora=lora, dropout=0.0):
        assert torch.equal(layer(x), without)
    torch.manual_seed(5)
    with ctxkern.use(layer, lora=lora, dropout=0.3):
        first, second = layer(x), layer(x)
    torch.manual_seed(5)
    mask = ctxkern.reference.lora_dropout_mask(torch.randint(2**62, (1, 1))[0], B * S, D, 0.3).view(B, S, D)
    (A, B_), base = lora["0"], torch.nn.functional.linear(x, plain.weight, plain.bias)
    torch.testing.assert_close(first, base + x.where(mask, 0) / 0.7 @ A.mT @ B_.mT)
    assert torch.equal(first, second)
    assert 0 < int((~mask).sum()) < mask.numel()
    assert not torch.equal(first, without)


def test_masks_differ_by_block_and_layer(model):
    with_adapters(model)
    x, index = torch.randn(B, S, D), torch.tensor([1, 0, 2, 1])
    block = ctxkern.use(model, adapter_index=index, dropout=0.5)
    found = []
    for _ in range(2):
        with block:
            found.append(model(x))
            seeds = list(model.blocks[0].up.attached.slot.used.seeds.values())
    assert not torch.equal(*found)
    assert len({int(seed) for seed in seeds}) == 4
    # without an adapter there is nothing to hide
    with ctxkern.use(model, dropout=0.5):
        none = model(x)
    with ctxkern.use(model):
        assert torch.equal(model(x), none)


@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpoints_have_the_masks_of_their_forward(model, how):
    with_adapters(model)
    x, index = torch.randn(B, S, D, requires_grad=True), torch.tensor([1, 0, 2, 1])
    found = []
    for model.how in (None, how):
        torch.manual_seed(3)
        model.zero_grad()
        with ctxkern.use(model, adapter_index=index, dropout=0.5):
            loss = model(x).square().sum()
        torch.manual_seed(4)
        loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("share", [-0.1, 1.0, True, "0.1"])
def test_dropout_is_a_share(model, share):
    with_adapters(model)
    with pytest.raises(ValueError, match=r"use: dropout is .*; it must be a number of at least 0 and below 1"):
        ctxkern.use(model, dropout=share)


def test_what_no_layer_takes_is_refused(model):
    with_adapters(model)
    index = torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="context is given and no layer of attach_contexts is there"):
        ctxkern.use(model, context=torch.randn(N, K))
    with pytest.raises(ValueError, match=r"adapter_index has shape \[\]; it must be \[B\]"):
        ctxkern.use(model, adapter_index=torch.tensor(1))
    with pytest.raises(TypeError, match=r"lora has something else than A \[B, r, D\] and B \[B, E, r\]"):
        ctxkern.use(model, lora={model.blocks[0].up.attached.name: torch.randn(B, 2, D)})
    other = with_contexts(new_model())
    for what in ({"adapter_index": index}, {"lora": {}}):
        with pytest.raises(ValueError, match="is given and no layer of attach_adapters is there"):
            ctxkern.use(other, **what)

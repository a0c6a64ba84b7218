"""KVCache: what concatenating gives, without copying what it holds at each step."""

import copy

import pytest
import torch

from ctxkern.nn import KVCache

B, H, HEAD = 2, 3, 4
CHUNKS = {"tokens": [1] * 9, "prompt": [7, 1, 1], "chunks": [2, 3, 4], "at-once": [9], "empty": [0, 3, 0, 6]}


def tokens(n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, H, n, HEAD, generator=generator).to(dtype).unbind()


@pytest.fixture(params=[torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def any_mode(request):
    with request.param():
        yield


@pytest.mark.usefixtures("any_mode")
@pytest.mark.parametrize("max_length", [None, 9, 20])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_holds_what_was_appended(chunks, max_length):
    k, v = tokens(9)
    cache = KVCache(max_length)
    assert (len(cache), cache.k, cache.v) == (0, None, None)
    end = 0
    for part_k, part_v in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
        end += part_k.shape[2]
        got = cache.append(part_k, part_v)
        assert len(cache) == end
        for (a, b), whole in zip(zip(got, (cache.k, cache.v), strict=True), (k, v), strict=True):
            assert torch.equal(a, whole[:, :, :end])
            assert torch.equal(b, whole[:, :, :end])


@torch.no_grad()
def test_appending_is_amortised():
    cache, buffers = KVCache(), set()
    one = tokens(1)
    for _ in range(2000):
        k, _ = cache.append(*one)
        buffers.add(k.untyped_storage().data_ptr())
    assert len(buffers) < 20
    assert k.untyped_storage().nbytes() < 2 * k.nbytes
    bounded = KVCache(50)
    assert len({bounded.append(*one)[0].untyped_storage().data_ptr() for _ in range(50)}) == 1


@pytest.mark.usefixtures("any_mode")
def test_views_of_earlier_steps_keep_their_values():
    cache, whole = KVCache(), tokens(40)
    seen = [cache.append(*(t[:, :, i : i + 1] for t in whole))[0] for i in range(40)]
    for i, k in enumerate(seen):
        assert torch.equal(k, whole[0][:, :, : i + 1])


def test_gradients_flow_through_earlier_steps():
    k, v = (t.double().requires_grad_() for t in tokens(5))
    cache, total = KVCache(), 0.0
    for i in range(5):
        keys, values = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        total = total + (keys * values).square().sum()
    got = torch.autograd.grad(total, (k, v))
    want = torch.autograd.grad(sum((k * v)[:, :, : i + 1].square().sum() for i in range(5)), (k, v))
    torch.testing.assert_close(got, want)


def test_steps_without_gradients_leave_an_earlier_graph_alone():
    k, v = (t.requires_grad_() for t in tokens(4))
    cache = KVCache(20)
    keys, values = cache.append(k, v)
    loss = (keys * values).sum()
    with torch.no_grad():
        for seed in range(6):
            cache.append(*tokens(1, seed))
    loss.backward()
    assert torch.equal(k.grad, v)


def test_queries_alone_learn():
    """Keys without gradients, which the graph of the queries holds while later steps append."""
    k, v = tokens(4)
    q, cache, losses = torch.randn(B, H, 1, HEAD, requires_grad=True), KVCache(20), []
    with torch.no_grad():
        cache.append(k[:, :, :2], v[:, :, :2])
    for i in range(2, 4):
        keys, _ = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        losses.append((q @ keys.mT).sum())
    with torch.no_grad():
        cache.append(k[:, :, :1], v[:, :, :1])
    (got,) = torch.autograd.grad(sum(losses), q)
    torch.testing.assert_close(got, (k[:, :, :3].sum(2) + k.sum(2))[:, :, None])


@pytest.mark.usefixtures("any_mode")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("max_length", [None, 60])
def test_copies_are_apart(copied, max_length):
    cache = KVCache(max_length)
    for seed in range(3):
        cache.append(*tokens(1, seed))
    other = copied(cache)
    first, second = tokens(2, 5), tokens(2, 6)
    cache.append(*first)
    other.append(*second)
    cache.append(*first)
    assert (len(cache), len(other)) == (7, 5)
    assert torch.equal(cache.k[:, :, 3:], torch.cat((first[0], first[0]), 2))
    assert torch.equal(other.v[:, :, 3:], second[1])
    assert torch.equal(cache.k[:, :, :3], other.k[:, :, :3])


@pytest.mark.usefixtures("any_mode")
def test_rows_of_a_beam_search():
    cache = KVCache()
    for seed in range(4):
        cache.append(*tokens(1, seed))
    rows, before = torch.tensor([1, 1, 0]), (cache.k.clone(), cache.v.clone())
    cache.k, cache.v = cache.k[rows], cache.v[rows]
    new = [t[rows] for t in tokens(1, 9)]
    k, v = cache.append(*new)
    assert torch.equal(k, torch.cat((before[0][rows], new[0]), 2))
    assert torch.equal(v, torch.cat((before[1][rows], new[1]), 2))


def test_made_in_inference_mode_and_continued_outside():
    cache, whole = KVCache(), tokens(6)
    with torch.inference_mode():
        for i in range(3):
            cache.append(*(t[:, :, i : i + 1].clone() for t in whole))
    with torch.no_grad():
        for i in range(3, 6):
            cache.append(*(t[:, :, i : i + 1] for t in whole))
    assert torch.equal(cache.k, whole[0])
    assert torch.equal(cache.v, whole[1])


@pytest.mark.usefixtures("any_mode")
def test_a_wider_dtype_widens_it():
    cache = KVCache()
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        cache.append(*tokens(1, dtype=dtype))
    assert cache.k.dtype is torch.float32
    assert torch.equal(cache.k[:, :, 2:], tokens(1)[0])


@pytest.mark.usefixtures("any_mode")
@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ((1, H, 1, HEAD), (1, H, 1, HEAD), r"k has shape \[1, 3, 1, 4\]; it must be \[2, 3, 1, 4\]"),
        ((B, H, 1, 1), (B, H, 1, 1), r"k has shape \[2, 3, 1, 1\]; it must be \[2, 3, 1, 4\]"),
        ((B, H, 1, HEAD), (B, H, 2, HEAD), r"v has shape \[2, 3, 2, 4\]; it must be \[2, 3, 1, 4\]"),
        ((B, H, 9, HEAD), (B, H, 9, HEAD), "k brings 12 tokens; they must be at most max_length = 8"),
    ],
)
def test_what_does_not_fit_leaves_it_alone(k, v, message):
    cache = KVCache(8)
    cache.append(*tokens(3))
    with pytest.raises(ValueError, match=message):
        cache.append(torch.zeros(k), torch.zeros(v))
    assert len(cache) == 3
    assert torch.equal(cache.k, tokens(3)[0])

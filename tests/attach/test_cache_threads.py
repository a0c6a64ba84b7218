"""cache_weights with several threads: none reads what another one writes."""

import threading

import pytest
import torch
from helpers.attached import D, K, S, assert_near, near, outside

import ctxkern
from ctxkern.serve import batches

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_two_threads_share_it(model):
    """Each with a batch of its own, in room for one and a half of them: weights move while others are read."""
    model.requires_grad_(False)
    tables = torch.randn(4, 2, K)
    x, one = torch.randn(2, S, D), ctxkern.cache_weights(model)
    bytes_each, wrong = one.context_bytes, []
    one.close()
    wants = [outside(model, x, table, torch.arange(2)) for table in tables]
    barrier = threading.Barrier(2)

    def run(first):
        barrier.wait()
        for i in range(60):
            number = (first + i) % 4
            with ctxkern.use(model, context=tables[number]), torch.no_grad():
                if not near(model(x), wants[number]):
                    wrong.append(number)

    with ctxkern.cache_weights(model, max_bytes=3 * bytes_each) as cache:
        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = cache.stats()
    assert not wrong
    assert counts.evictions > 10
    assert counts.bytes <= 3 * bytes_each
    assert counts.hits + counts.misses + 2 * counts.uncached == 2 * 60 * 4 * 2
    assert not cache._active


def test_slots_that_a_call_reads_are_not_given_away(model, monkeypatch):
    """While a product of one thread is under way, another one's batch finds no room, and is computed without."""
    tables, x = torch.randn(2, 2, K), torch.randn(2, S, D)
    wants = [outside(model, x, table, torch.arange(2)) for table in tables]
    inside, found, real = [], [], batches.project

    def other():
        with ctxkern.use(model, context=tables[1]), torch.no_grad():
            found.append(model(x))

    def slow(*args):
        if not inside:
            inside.append(1)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return real(*args)

    monkeypatch.setattr("ctxkern.serve.cache.project", slow)
    with ctxkern.cache_weights(model, max_bytes=1 << 30) as cache:
        cache.max_contexts = 3
        with ctxkern.use(model, context=tables[0]):
            assert_near(model(x), wants[0])
        assert cache.stats().evictions == 0
        assert cache.stats().uncached >= 1
    assert_near(found[0], wants[1])

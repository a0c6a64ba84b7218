"""ctxkern.runtime.memory: large gradients lie in memory that is kept for a while after they are dropped."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ctxkern
from ctxkern.runtime import cpu as cpu_runtime
from ctxkern.runtime import memory
from ctxkern.testing.cases import Case, make_inputs

pytestmark = pytest.mark.skipif(not cpu_runtime.available(), reason=cpu_runtime.reason() or "available")

MIB = 1 << 20
LAYER = Case("layer", 4, 8, 256, 256, 32)


@pytest.fixture(autouse=True)
def released():
    gc.collect()
    memory.release()
    yield
    memory.release()


def filled(mib, value):
    return memory.empty_like(torch.empty(mib, MIB // 4)).fill_(value)


def python(code, **env):
    """Runs `code` in a fresh process, away from a tree that may not be built."""
    env = {**os.environ, "PYTHONPATH": str(Path(ctxkern.__file__).parents[1]), **env}
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, timeout=300)


def test_memory_of_a_dropped_result_serves_the_next_of_its_size():
    first = filled(16, 1)
    at = first.data_ptr()
    assert memory.kept_bytes() == 0
    del first
    assert memory.kept_bytes() == 16 * MIB
    second = filled(16, 2)
    assert second.data_ptr() == at
    assert memory.kept_bytes() == 0


def test_memory_in_use_is_never_handed_out():
    kept = {i: filled(16, i) for i in range(4)}
    view = kept.pop(1)[3]
    for i in range(4, 7):
        kept[i] = filled(16, i)
    assert memory.kept_bytes() == 0
    assert (view == 1).all()
    assert all((t == i).all() for i, t in kept.items())


def test_another_size_releases_what_is_kept():
    results = [filled(16, 1), filled(16, 2)]
    results.clear()
    assert memory.kept_bytes() == 32 * MIB
    other = filled(12, 3)
    assert memory.kept_bytes() == 0
    del other
    assert memory.kept_bytes() == 12 * MIB
    memory.release()
    assert memory.kept_bytes() == 0


def test_no_more_than_a_gibibyte_is_kept():
    # not touched, so addresses alone
    results = [memory.empty_like(torch.empty(300, MIB // 4)) for _ in range(5)]
    results.clear()
    assert memory.kept_bytes() == 900 * MIB


@pytest.mark.parametrize(("context_dim", "small"), [(63, True), (64, False)])
def test_small_results_are_torchs(context_dim, small):
    bilinear = torch.zeros(256, 128, context_dim, requires_grad=True)
    y = ctxkern.modulated_linear(torch.ones(1, 1, 256), torch.ones(1, context_dim), None, bilinear, backend="cpu")
    (grad,) = torch.autograd.grad(y.sum(), bilinear)
    assert grad.untyped_storage().resizable() == small
    kept = grad.nbytes
    del grad
    assert memory.kept_bytes() == (0 if small else kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "like",
    [
        lambda t: t,
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(512, -1, -1),
    ],
    ids=["contiguous", "permuted", "gaps", "expanded"],
)
def test_layout_is_that_of_torch(like, dtype):
    t = like(torch.empty(256, 512, 64, dtype=dtype))
    made, expected = memory.empty_like(t), torch.empty_like(t)
    assert made.dtype == dtype
    assert made.shape == expected.shape
    assert made.stride() == expected.stride()
    assert made.data_ptr() % 64 == 0
    assert not made._is_view()


def test_results_copy_pickle_and_share():
    t = filled(16, 3)
    assert torch.equal(copy.deepcopy(t), t)
    assert torch.equal(pickle.loads(pickle.dumps(t)), t)
    t.share_memory_()
    assert t.is_shared()
    assert (t == 3).all()


def test_a_default_device_does_not_reach_them():
    with torch.device("meta"):
        assert memory.empty_like(torch.empty(16, MIB // 4, device="cpu")).device.type == "cpu"


def test_a_thread_may_drop_what_another_made():
    held = [filled(16, 1)]
    dropping = threading.Thread(target=held.clear)
    dropping.start()
    dropping.join()
    assert memory.kept_bytes() == 16 * MIB


def step(inputs, backend="cpu"):
    inputs = inputs.leaves()
    positional, keywords = inputs.arguments()
    ctxkern.modulated_linear(*positional, **keywords, backend=backend).backward(inputs.dy)
    return inputs.bilinear.grad


def test_gradients_of_steps_lie_in_the_same_memory_and_are_right():
    inputs = make_inputs(LAYER)
    expected = step(inputs, "reference")
    places = set()
    for _ in range(3):
        grad = step(inputs)
        torch.testing.assert_close(grad, expected)
        places.add(grad.data_ptr())
        # what was there before must not count
        grad.fill_(float("nan"))
        del grad
    assert len(places) == 1


def test_gradients_add_up_over_steps():
    leaves = make_inputs(LAYER).leaves()
    positional, keywords = leaves.arguments()
    grads = []
    for _ in range(3):
        ctxkern.modulated_linear(*positional, **keywords, backend="cpu").backward(leaves.dy)
        grads.append(leaves.bilinear.grad.clone())
    torch.testing.assert_close(grads[2], 3 * grads[0])


_TWO = """
import torch
from ctxkern.runtime import memory
t = memory.empty_like(torch.empty(4, 1 << 20))
del t
print(memory.kept_bytes())
"""


@pytest.mark.parametrize(("seconds", "kept"), [("0", 0), ("", 16 * MIB), ("0.5", 16 * MIB), ("inf", 16 * MIB)])
def test_the_environment_says_how_long(seconds, kept):
    done = python(_TWO, CTXKERN_KEPT_SECONDS=seconds)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kept


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "1 s"])
def test_an_environment_that_is_wrong_is_an_error(seconds):
    done = python(_TWO, CTXKERN_KEPT_SECONDS=seconds)
    assert f"CTXKERN_KEPT_SECONDS is '{seconds}'; it must be a number of seconds, 0 or more" in done.stderr


def test_a_forward_releases_what_has_waited_too_long():
    code = (
        "import time, torch, ctxkern\n"
        "from ctxkern.runtime import memory\n"
        "t = memory.empty_like(torch.empty(4, 1 << 20))\n"
        "del t\n"
        "x, c, w, b = (torch.ones(s) for s in ((1, 2, 4), (1, 3), (4, 4), (4, 4, 3)))\n"
        "ctxkern.modulated_linear(x, c, w, b)\n"
        "before = memory.kept_bytes()\n"
        "time.sleep(1)\n"
        "ctxkern.modulated_linear(x, c, w, b)\n"
        "print(before, memory.kept_bytes())"
    )
    done = python(code, CTXKERN_KEPT_SECONDS="0.9")
    assert done.stdout.split() == [str(16 * MIB), "0"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_released_leaves_the_process():
    code = (
        "import torch\n"
        "from ctxkern.runtime import memory\n"
        "def held():\n"
        "    with open('/proc/self/statm') as file:\n"
        "        return int(file.read().split()[1]) * 4 // 1024\n"
        "t = memory.empty_like(torch.empty(256, 1 << 18)).fill_(1)\n"
        "full = held()\n"
        "del t\n"
        "kept = held()\n"
        "memory.release()\n"
        "print(full - kept, kept - held())"
    )
    kept, gone = map(int, python(code).stdout.split())
    assert kept < 32
    assert gone > 224


def test_gradients_may_outlive_the_interpreter():
    code = (
        "import torch\n"
        "from ctxkern.runtime import memory\n"
        "p = torch.nn.Parameter(torch.ones(16, 1 << 18))\n"
        "p.grad = memory.empty_like(p).fill_(2)\n"
        "kept = [p, memory.empty_like(p)]\n"
        "kept.append(kept)\n"
        "import builtins; builtins.kept = kept"
    )
    done = python(code)
    assert done.returncode == 0
    assert not done.stderr

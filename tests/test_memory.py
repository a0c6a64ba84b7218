"""Memory: temporaries stay below workspace_bytes + O(N·D), by torch's allocator and by the process's own size."""

import subprocess
import sys

import pytest
import torch

import ctxkern
from ctxkern.plan import DEFAULT_WORKSPACE
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.measure import peak_extra_bytes
from ctxkern.testing.peers import calls

MIB = 1 << 20
WIDE = Case("wide", 32, 128, 512, 512, 64)
SHARED = Case("shared", 32, 64, 256, 256, 64, rows=5, index=tuple(i % 5 for i in range(32)))
RAGGED = Case("ragged", 32, 0, 256, 256, 64, lengths=tuple(16 + 4 * i for i in range(32)))
PER_TOKEN = Case("per-token", 8, 64, 256, 256, 64, per_token=True)
PERMUTED = Case("permuted", 32, 64, 256, 256, 64, bilinear_layout="permuted")
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32-params": (torch.bfloat16, torch.float32),
}
# copies of x, y and their gradients, in float32, that a call may hold: regrouped, cast, accumulated
COPIES = 3


def allowance(case):
    return COPIES * case.tokens * max(case.D, case.E) * 4


def call(inputs, backward, workspace=None, peer="ctxkern"):
    run = calls(inputs, backward)[peer]
    if workspace is not None:
        fn, args, dy = run.args
        run = type(run)(run.func, type(fn)(fn.func, **{**fn.keywords, "workspace_bytes": workspace}), args, dy)
    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("workspace", [2 * MIB, None], ids=["ws-2M", "ws-default"])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [WIDE, SHARED, RAGGED, PER_TOKEN, PERMUTED], ids=lambda c: c.id)
def test_temporaries_stay_within_the_workspace(case, dtype, param_dtype, workspace, backward):
    run = call(make_inputs(case, dtype, param_dtype), backward, workspace)
    assert peak_extra_bytes(run) <= (workspace or DEFAULT_WORKSPACE) + allowance(case)


def test_the_einsum_does_not():
    """The measure sees the weights that the einsum builds, B·D·E elements, which pass the smaller workspace."""
    run = call(make_inputs(WIDE), True, peer="einsum")
    assert peak_extra_bytes(run) > 2 * MIB + allowance(WIDE)


@pytest.mark.parametrize("shape", [(64, 1, 1024, 256, 64), (1, 128, 2048, 256, 1), (8, 256, 1024, 64, 8)], ids=str)
@pytest.mark.parametrize("threads", [2, 64])
def test_temporaries_of_lora_linear_do_not_grow_with_the_threads(threads, shape):
    sequences, length, width, rank, adapters = shape
    x, dy = (torch.randn(sequences, length, width) for _ in range(2))
    weight, A, B = torch.randn(width, width), torch.randn(adapters, rank, width), torch.randn(adapters, width, rank)
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def run():
        y = ctxkern.lora_linear(x, weight, A, B)
        return y, torch.autograd.grad(y, leaves, dy)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run()
        peak = peak_extra_bytes(run)
    finally:
        torch.set_num_threads(before)
    # x, y and their gradients in float32, twice
    assert peak <= DEFAULT_WORKSPACE + 8 * sequences * length * width * 4


_PROCESS = """
import resource, sys, torch
from ctxkern.plan import DEFAULT_WORKSPACE
from ctxkern.testing.cases import Case, make_inputs
from ctxkern.testing.peers import calls
peer, backward = sys.argv[1], sys.argv[2] == "True"
case = Case("wide", 32, 128, 512, 512, 64)
small = calls(make_inputs(Case("warm", 8, 128, 64, 64, 16)), backward)[peer]
small()
run = calls(make_inputs(case), backward)[peer]
torch.zeros(1 << 20)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024

before = held()
result = run()
print(peak() - max(before, held()))
"""


def _process_peak(peer, backward):
    """Bytes by which the process grew at its largest, beyond what it holds with the results."""
    command = [sys.executable, "-c", _PROCESS, peer, str(backward)]
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak of a process cannot be reset here: /proc/self/clear_refs")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_the_process_agrees(backward):
    """What the allocator does not see (packing buffers of the product's library) stays small too."""
    assert _process_peak("ctxkern", backward) <= 32 * MIB + allowance(WIDE)

"""Launches that are kept from call to call: the same as Triton's own, for other tensors, alignments, hooks, tiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
_STEP = """
import gc, threading, weakref
import torch
import ctxkern
from ctxkern.runtime.triton.tiles import Tile
from ctxkern.testing import force
from ctxkern.testing.cases import Case, make_inputs

def step(made):
    first = made[0]
    leaves = [t.requires_grad_() for one in made for t in (one.weight, one.bilinear)]
    leaves += [first.x.requires_grad_(), first.context.requires_grad_()]
    lists = [[getattr(one, name) for one in made] for name in ("weight", "bilinear", "bias")]
    spans = dict(context_index=first.context_index, cu_seqlens=first.cu_seqlens)
    outs = ctxkern.modulated_qkv(first.x, first.context, *lists, **spans, backend="triton")
    return outs, torch.autograd.grad(outs, leaves, [one.dy for one in made])
"""


def fresh(code, **variables):
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_call_that_differs_is_laid_out_again_and_nothing_else_is_kept():
    fresh(
        "from overhead import note_launches\n"
        + _STEP
        + """
from ctxkern.modulated.triton import _KEPT
launches = note_launches()
whole = torch.zeros(4 * 64 * 48 + 1, dtype=torch.bfloat16)
context, bilinear = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(48, 80, 16, dtype=torch.bfloat16)
turned = torch.zeros(16, 48, 80, dtype=torch.bfloat16).permute(1, 2, 0)

def forward(x, t):
    launches.clear()
    ctxkern.modulated_linear(x.view(4, 64, 48), context, None, t, backend="triton")
    assert [name for name, *_ in launches] == ["_panel_weights_kernel", "_panel_y_kernel"], launches
    (_, _, weights), (_, grid, y) = launches
    assert weights[0][0].data_ptr() == t.data_ptr() and y[0].data_ptr() == x.data_ptr()
    assert (1280, 16, 1) == tuple(one for one, in weights[8]) or t is turned, weights
    return weights[8], grid

for x, t in ((whole[:-1], bilinear), (whole[1:], bilinear), (whole[:-1], turned), (whole[:-1], bilinear)):
    forward(x, t)
assert len(_KEPT) == 3, len(_KEPT)
with force(tiles={"panel_y": Tile(16, 16, 16, 4, 2)}):
    _, small = forward(whole[:-1], bilinear)
_, large = forward(whole[:-1], bilinear)
assert small[0] > large[0] and len(_KEPT) == 4

# parameters that were one tensor are not taken for one later
case = Case("panel", 4, 64, 48, 80, 16)
made = [make_inputs(case, torch.bfloat16, seed=i) for i in range(3)]
step(made[:1] * 3)
launches.clear()
step(made)
weights = next(args for name, _, args in launches if "weights" in name)
assert [t.data_ptr() for t in weights[0]] == [one.bilinear.data_ptr() for one in made]

failed = []
def work(n):
    try:
        for i in range(60):
            ctxkern.modulated_linear(made[(i + n) % 3].x, context, None, made[i % 3].bilinear, backend="triton")
    except BaseException as error:
        failed.append(error)
launches.clear()
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert not failed and len(launches) == 2 * 60 * 4, failed

watched = [weakref.ref(t) for t in (made[0].x, made[1].bilinear, made[2].dy)]
launches.clear()
del made, weights
gc.collect()
assert [ref() for ref in watched] == [None] * 3
"""
    )


_DRIVER = (
    _STEP
    + """
import ctypes, os
from pathlib import Path
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel
from triton.runtime import driver
from ctxkern import registry
from ctxkern.runtime.triton import launches

STREAM = 119
CudaDriver.get_current_device = lambda self: 0
CudaDriver.get_device_capability = lambda self, device: (9, 0)
active = CudaDriver()
# where torch has no CUDA these are its errors, set on the object
active.get_current_device, active.get_device_capability = (lambda: 0), (lambda device: (9, 0))
active.get_current_stream, active.set_current_device = (lambda device: STREAM), (lambda device: None)
driver.set_active(active)
registry.statuses["triton"] = registry.Status("available")
registry._ON_CPU["triton"] = lambda: True
launches.stream_of = lambda device: STREAM

SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
libcuda = ctypes.CDLL("libcuda.so.1")
loaded = CompiledKernel._init_handles

def flat(signature):
    for each in signature:
        if isinstance(each, (tuple, list)):
            yield from flat(each)
        elif each != "constexpr":
            yield 8 if each[0] == "*" else SIZES[each]

def described(self):
    if self.module is None:
        loaded(self)
        sizes = list(flat(self.src.signature.values()))
        libcuda.describe(ctypes.c_void_p(self.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))

CompiledKernel._init_handles = described

# no memory is used twice within a call, so that addresses stand for tensors
alive = []

def held(allocate):
    def new(*args, **options):
        alive.append(allocate(*args, **options))
        return alive[-1]
    return new

launches.empty, launches.zeros = held(torch.empty), held(torch.zeros)
log = Path(os.environ["LAUNCHES"])

def launched(made):
    alive.clear()
    log.write_text("")
    alive.append(step(made))
    return [line.split() for line in log.read_text().splitlines()]
"""
)


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """The environment of a process whose CUDA driver is libcuda.c."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if torch.version.cuda is not None:
        pytest.skip("torch has its own CUDA, which needs a driver with a device: bench/gpu.py")
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", source]
    done = subprocess.run([*command, "-o", folder / "libcuda.so.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    return {"LD_LIBRARY_PATH": path, "LAUNCHES": str(folder / "launches")}


def test_the_driver_gets_what_tritons_own_launcher_gives_it(libcuda):
    done = fresh(
        _DRIVER
        + """
CASES = [
    Case("panel", 4, 64, 48, 80, 16),
    Case("indexed", 4, 0, 32, 32, 8, bias=True, rows=3, index=(2, 1, 2, 0), lengths=(10, 0, 30, 40)),
    Case("token", 2, 16, 32, 32, 8, per_token=True),
]
count = 0
for case in CASES:
    made = [make_inputs(case, torch.bfloat16, torch.float32, seed=i) for i in range(3)]
    first, again = launched(made), launched(made)
    hook = lambda metadata: metadata.get()
    knobs.runtime.launch_enter_hook.add(hook)
    hooked = launched(made)
    knobs.runtime.launch_enter_hook.remove(hook)
    for other in (again, hooked):
        assert len(first) == len(other) > 3, case.id
        moved = {}
        for one, two in zip(first, other):
            assert one[:5] == two[:5] and one[4] == str(STREAM) and len(one) == len(two), (one, two)
            for a, b in zip(one[5:], two[5:]):
                assert a == b or int(a) > 1 << 32 and moved.setdefault(a, b) == b, (one, two)
        assert len(set(moved.values())) == len(moved), case.id
    count += len(first)
print(count)
""",
        **libcuda,
    )
    assert int(done.split()[-1]) > 20, done


def test_overhead_is_measured_and_launches_that_are_kept_cost_less():
    done = fresh("import overhead; overhead.main(['--seconds', '0.3'])")
    lines = [line.split() for line in done.splitlines()]
    times = {
        (line[0], line[1], " ".join(line[2 : line.index("µs") - 1])): int(line[line.index("µs") - 1]) for line in lines
    }
    for case in ("step", "indexed", "decode"):
        for count in "13":
            assert times[case, count, "step"] < times[case, count, "step, first"], done
            assert times[case, count, "forward, linear"] > 0

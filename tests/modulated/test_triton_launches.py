"""Launches that are kept from call to call: the same as Triton's own, for other tensors, alignments, hooks, threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

_STEP = """
import gc, threading, weakref
import torch
import ctxkern
from ctxkern import plan as planner
from ctxkern.testing.cases import Case, make_inputs

def step(made, count=3):
    made = [made] * count if not isinstance(made, list) else made
    first = made[0]
    leaves = [t.requires_grad_() for one in made for t in (one.weight, one.bilinear)]
    leaves += [first.x.requires_grad_(), first.context.requires_grad_()]
    lists = [[getattr(one, name) for one in made] for name in ("weight", "bilinear", "bias")]
    spans = dict(context_index=first.context_index, cu_seqlens=first.cu_seqlens)
    outs = ctxkern.modulated_qkv(first.x, first.context, *lists, **spans, backend="triton")
    return outs, torch.autograd.grad(outs, leaves, [one.dy for one in made])
"""

_BEGIN = (
    _STEP
    + """
from ctxkern.testing.driver import note_launches

launches = note_launches()

def plain(value, known):
    if isinstance(value, torch.Tensor):
        # memory of the call itself: what matters is its kind
        return known.get(value.data_ptr(), (tuple(value.shape), value.dtype)) if value.numel() else "empty"
    if isinstance(value, tuple):
        return tuple(plain(each, known) for each in value)
    return value

def described(launches, known=None):
    made = [(name, grid, tuple(plain(value, known or {}) for value in args)) for name, grid, args in launches]
    launches.clear()
    return made

def known_of(made):
    parts = {f"{i}.{name}": getattr(one, name) for i, one in enumerate(made) for name in ("x", "context", "weight",
             "bilinear", "bias", "context_index", "cu_seqlens", "dy")}
    return {t.data_ptr(): name for name, t in parts.items() if t is not None and t.numel()}
"""
)


def fresh(code, **variables):
    root = Path(__import__("ctxkern").__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_second_call_launches_what_triton_launched_at_the_first():
    fresh(
        _BEGIN
        + """
CASES = [
    Case("panel", 4, 64, 48, 80, 16),
    Case("odd", 3, 17, 13, 7, 5, bias=True),
    Case("shared", 6, 32, 32, 32, 8, rows=4, index=(3, 1, 3, 0, 0, 2)),
    Case("ragged", 4, 0, 32, 32, 8, lengths=(10, 0, 30, 40)),
    Case("indexed", 4, 0, 32, 32, 8, rows=3, index=(2, 1, 2, 0), lengths=(10, 0, 30, 40)),
    Case("decode", 8, 1, 32, 32, 8),
    Case("token", 2, 16, 32, 32, 8, per_token=True),
    Case("wide-k", 2, 64, 16, 16, 300),
]
for planner.GPU_PERSISTENT in (None, True):
    for case in CASES:
        for dtype, param_dtype in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2):
            # of the second call, tensors of their own
            one, two = ([make_inputs(case, dtype, param_dtype, seed=i + n) for i in range(3)] for n in (0, 3))
            for other in (one, two):
                for each in other[1:]:
                    each.dy = each.dy.clone()
            step(one)
            first = described(launches, known_of(one))
            step(two)
            again = described(launches, known_of(two))
            assert first == again, (case.id, first, again)
            assert len(first) > 3, case.id
"""
    )


def test_tensors_of_another_alignment_or_layout_are_looked_at_anew():
    fresh(
        _BEGIN
        + """
whole = torch.zeros(4 * 64 * 48 + 1, dtype=torch.bfloat16)
context, bilinear = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(48, 80, 16, dtype=torch.bfloat16)
turned = torch.zeros(16, 48, 80, dtype=torch.bfloat16).permute(1, 2, 0)
names = []
for x, t in ((whole[:-1], bilinear), (whole[1:], bilinear), (whole[:-1], turned), (whole[:-1], bilinear)):
    x = x.view(4, 64, 48)
    ctxkern.modulated_linear(x, context, None, t, backend="triton")
    project = next(l for l in launches if "project" in l[0])
    make = next(l for l in launches if "make" in l[0])
    assert project[2][0].data_ptr() == x.data_ptr()
    assert ((1280,), (16,), (1,)) == make[2][7] or t is turned, make[2]
    names.append(make[2][7])
    launches.clear()
from ctxkern.modulated.triton.modulated import _KEPT
assert len(_KEPT) == 3, len(_KEPT)
assert names[0] == names[1] == names[3] != names[2]
"""
    )


def test_the_order_of_repeated_parameters_is_not_kept():
    fresh(
        _BEGIN
        + """
case = Case("panel", 4, 64, 48, 80, 16)
same = make_inputs(case, torch.bfloat16)
step(same)
launches.clear()
others = [make_inputs(case, torch.bfloat16, seed=i) for i in range(3)]
step(others)
make = next(args for name, _, args in launches if "make" in name)
assert [t.data_ptr() for t in make[0]] == [one.bilinear.data_ptr() for one in others]
"""
    )


def test_nothing_of_a_call_is_kept_alive():
    fresh(
        _BEGIN
        + """
made = make_inputs(Case("panel", 4, 64, 48, 80, 16), torch.bfloat16)
for _ in range(2):
    step(made)
watched = [weakref.ref(t) for t in (made.x, made.context, made.weight, made.bilinear, made.dy)]
launches.clear()
del made
gc.collect()
assert [ref() for ref in watched] == [None] * 5
"""
    )


def test_hooks_of_profilers_are_called_at_every_launch():
    fresh(
        _BEGIN
        + """
from triton import knobs
entered, left = [], []
made = make_inputs(Case("panel", 4, 64, 48, 80, 16), torch.bfloat16)
step(made)
count = len(launches)
knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
knobs.runtime.launch_exit_hook.add(left.append)
step(made)
assert entered == [name for name, *_ in launches[count:]], entered
assert len(left) == len(entered) == count
"""
    )


def test_threads_may_call_at_once():
    fresh(
        _BEGIN
        + """
made = [make_inputs(Case("panel", 4, 64, 48, 16 * (1 + i), 16), torch.bfloat16) for i in range(4)]
failed = []
def work(n):
    try:
        for i in range(60):
            ctxkern.modulated_linear(made[(i + n) % 4].x, made[0].context, None, made[(i + n) % 4].bilinear,
                                     backend="triton")
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert not failed, failed
assert len(launches) == 2 * 60 * 4
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
from ctxkern.runtime.triton import launches, tiles

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
launches._stream = lambda device: STREAM

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
        pytest.skip("torch has a CUDA of its own, which needs a driver with a device: bench/gpu.py")
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", source]
    done = subprocess.run([*command, "-o", folder / "libcuda.so.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    return {"LD_LIBRARY_PATH": path, "LAUNCHES": str(folder / "launches")}


def test_tritons_own_launcher_gives_the_driver_the_same_at_the_second_call(libcuda):
    done = fresh(
        _DRIVER
        + """
CASES = [
    Case("panel", 4, 64, 48, 80, 16),
    Case("indexed", 4, 0, 32, 32, 8, bias=True, rows=3, index=(2, 1, 2, 0), lengths=(10, 0, 30, 40)),
    Case("token", 2, 16, 32, 32, 8, per_token=True),
]
count = 0
for planner.GPU_PERSISTENT in (None, True):
    for case in CASES[: 1 if planner.GPU_PERSISTENT else None]:
        made = [make_inputs(case, torch.bfloat16, torch.float32, seed=i) for i in range(3)]
        tiles.forget()
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
    script = Path(__file__).parents[2] / "bench" / "overhead.py"
    code = (
        f"import runpy, sys; sys.argv[1:] = ['--seconds', '0.3']; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = fresh(code)
    lines = [line.split() for line in done.splitlines()]
    times = {
        (line[0], line[1], " ".join(line[2 : line.index("µs") - 1])): int(line[line.index("µs") - 1]) for line in lines
    }
    for case in ("step", "indexed", "decode"):
        for count in "13":
            assert times[case, count, "step"] < times[case, count, "step, anew"], done
            assert times[case, count, "forward, linear"] > 0

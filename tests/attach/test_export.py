"""Attached, merged and detached models through torch.export, AOTInductor and ONNX: the same results there."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from helpers import merged
from helpers.attached import B, D, K, N, S, new_model, with_adapters, with_contexts
from torch import nn

import ctxkern
from ctxkern.testing.oracle import assert_matches

BATCH = torch.export.Dim("batch", min=2, max=64)


class Served(nn.Module):
    """An attached model as a function of tensors: what it uses are inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, index, context=None):
        used = {"adapter_index": index} if context is None else {"context": context, "context_index": index}
        with ctxkern.use(self.model, **used):
            return self.model(x)


class Alone(nn.Module):
    """A merged model as a function of x alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, None)


def int8(model):
    with_contexts(model)
    ctxkern.quantize_bilinear(model)
    return model


ATTACHED = {"contexts": with_contexts, "factors": lambda m: with_contexts(m, rank=2), "int8": int8}
ATTACHED["adapters"] = with_adapters


def served(kind):
    """(Served, examples of several sizes, dynamic shapes)."""
    model = Served(ATTACHED[kind](new_model()).eval().requires_grad_(False))
    rows = () if kind == "adapters" else (torch.randn(N, K),)
    low = -1 if kind == "adapters" else 0
    examples = [(torch.randn(b, S, D), torch.randint(low, N, (b,)), *rows) for b in (B, 2, 7)]
    shapes = {"x": {0: BATCH}, "index": {0: BATCH}, "context": None}
    return model, examples, shapes


def plain(kind):
    """(a plain model, examples, dynamic shapes): contexts or an adapter merged in, by `detach` or `merge`."""
    torch.manual_seed(0)
    if kind == "merge":
        model = Alone(ctxkern.merge(merged.new_model(), torch.randn(merged.K)))
        width, seq = merged.D, merged.S
    else:
        model = ATTACHED[kind](new_model())
        used = {"adapter": 1} if kind == "adapters" else {"context": torch.randn(K)}
        ctxkern.detach(model, **used)
        width, seq = D, S
    examples = [(torch.randn(b, seq, width),) for b in (B, 2, 7)]
    return model.eval().requires_grad_(False), examples, {"x": {0: BATCH}}


@torch.no_grad()
def assert_in_budget(got, model, args):
    """The error of another program is at most twice that of the model itself, each by the model in float64."""
    exact = copy.deepcopy(model).double()(*(t.double() if t.is_floating_point() else t for t in args))
    assert_matches({"y": got}, {"y": exact}, {"y": model(*args)})


PLAIN = ["contexts", "factors", "int8", "adapters", "merge"]


def exported(kind, make, strict=False):
    model, examples, shapes = make(kind)
    if len(examples[0]) == 2:
        del shapes["context"]
    with torch.no_grad():
        return torch.export.export(model, examples[0], dynamic_shapes=shapes, strict=strict), model, examples


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(
    ("kind", "strict"),
    [pytest.param(kind, False, id=kind) for kind in ATTACHED]
    + [pytest.param(kind, True, id=f"{kind}-strict", marks=pytest.mark.slow) for kind in ATTACHED],
)
def test_an_attached_model_with_what_it_uses_as_inputs(kind, strict):
    program, model, examples = exported(kind, served, strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for args in examples:
        want = model(*args)
        torch.testing.assert_close(program.module()(*args), want)
        torch.testing.assert_close(loaded(*args), want)
    # what it used while it was exported is no constant
    x, index, *rows = examples[0]
    assert not torch.allclose(loaded(x, index.roll(1), *rows), model(*examples[0]))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_model_calls_no_operator_of_ctxkern(kind):
    program, model, examples = exported(kind, plain)
    assert "ctxkern" not in program.graph_module.code
    for args in examples:
        torch.testing.assert_close(program.module()(*args), model(*args))


def test_a_cache_is_no_part_of_a_program():
    model, examples, shapes = served("contexts")
    with ctxkern.cache_weights(model), torch.no_grad():
        want = model(*examples[0])
        program = torch.export.export(model, examples[0], dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(*examples[0]), want)
    assert "modulated_forward" in program.graph_module.code


LOADER = """
import sys
import torch
if sys.argv[3] == "attached":
    import ctxkern  # registers the operators
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(*args) for args in torch.load(sys.argv[2])], sys.argv[2])
assert sys.argv[3] == "attached" or not any(name.split(".")[0] == "ctxkern" for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make"),
    [pytest.param(kind, plain, id=f"plain-{kind}") for kind in ("contexts", "adapters", "merge")]
    + [pytest.param(kind, served, id=f"attached-{kind}") for kind in ATTACHED],
)
def test_an_inductor_package_in_another_process(kind, make, tmp_path):
    program, model, examples = exported(kind, make)
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "examples.pt")]
    torch._inductor.aoti_compile_and_package(program, package_path=files[0])
    torch.save(examples, files[1])
    which = "attached" if make is served else "plain"
    command = [sys.executable, "-W", "ignore", "-c", LOADER, *files, which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for args, got in zip(examples, torch.load(files[1]), strict=True):
        assert_in_budget(got, model, args)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, examples, shapes = plain(kind)
    program = torch.onnx.export(model, examples[0], dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    for (x,) in examples:
        (got,) = session.run(None, {given.name: x.numpy()})
        assert_in_budget(torch.from_numpy(got), model, (x,))

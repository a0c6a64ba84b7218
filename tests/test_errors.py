"""What callers get wrong: every error names the argument, what it got and what it takes; inputs stay as they are."""

import re
from dataclasses import dataclass, field

import pytest
import torch

import ctxkern

B, S, D, E, K, R = 2, 3, 4, 6, 5, 2


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def index(*values):
    return ints(*values, dtype=torch.int64)


X, PACKED = zeros(B, S, D), zeros(7, D)
PADDED = {"x": X, "context": zeros(B, K)}
WEIGHTS = {"weight": zeros(D, E), "bilinear": zeros(D, E, K), "bias": zeros(E)}
FACTORS = {"weight": zeros(D, E), "in_factor": zeros(D, R), "context_factor": zeros(K, R), "out_factor": zeros(R, E)}
BASE = {
    "modulated_linear": PADDED | WEIGHTS,
    "explain": PADDED | WEIGHTS,
    "modulated_qkv": PADDED | {f"{n}es" if n == "bias" else f"{n}s": [t] * 3 for n, t in WEIGHTS.items()},
    "lora_linear": {"x": X, "weight": zeros(E, D), "A": zeros(B, R, D), "B": zeros(B, E, R), "bias": zeros(E)},
    "explain_lora": {"x": X, "weight": zeros(E, D), "A": zeros(B, R, D), "B": zeros(B, E, R)},
    "factored_modulated_linear": PADDED | FACTORS,
    "bilinear": {"input1": zeros(B, D), "input2": zeros(B, K), "weight": zeros(E, D, K), "bias": zeros(E)},
}
SPARSE = torch.eye(D, D).to_sparse()
NESTED = torch.nested.nested_tensor([zeros(3, D), zeros(2, D)], layout=torch.jagged)


@dataclass
class Bad:
    """A call of `fn` with changed arguments, and what its error says: the argument, what it got, what it takes."""

    fn: str
    argument: str
    error: type
    got: str
    takes: str
    change: dict = field(default_factory=dict)

    @property
    def id(self):
        return f"{self.fn}-{self.argument}-{self.got}-{self.takes}"


def linear(argument, error, got, takes, value, **others):
    return Bad("modulated_linear", argument, error, got, takes, {argument: value} | others)


def tokens(argument, got, takes, **change):
    return Bad("modulated_linear", argument, ValueError, got, takes, {"context": zeros(B, S, K)} | change)


def packed(error, got, takes, cu_seqlens, fn="modulated_linear", **others):
    return Bad(fn, "cu_seqlens", error, got, takes, {"x": PACKED, "cu_seqlens": cu_seqlens} | others)


def qkv(argument, error, got, takes, **change):
    return Bad("modulated_qkv", argument, error, got, takes, change)


def explained(argument, error, got, takes, **change):
    return Bad("explain_lora", argument, error, got, takes, change)


def lora(argument, error, got, takes, **change):
    return Bad("lora_linear", argument, error, got, takes, change)


def factored(argument, error, got, takes, **change):
    return Bad("factored_modulated_linear", argument, error, got, takes, change)


TABLE = [
    linear("x", TypeError, "list", r"tensor \[B, S, D\]", [[1.0]]),
    linear("x", TypeError, "NoneType", "tensor", None),
    linear("x", TypeError, "int64", "float32 or", X.long()),
    linear("x", TypeError, "complex64", "float32 or", X.to(torch.complex64)),
    linear("x", ValueError, r"\[4\]", r"\[B, S, D\] or packed \[N, D\]", zeros(D)),
    linear("x", ValueError, r"\[1, 2, 3, 4\]", r"\[B, S, D\]", X[None]),
    linear("x", TypeError, "sparse", "strided", SPARSE),
    linear("x", TypeError, "nested", "strided", NESTED),
    linear("x", ValueError, r"\[7, 4\]", "cu_seqlens", PACKED),
    linear("x", ValueError, r"\[2, 3, 4\]", r"packed \[N, D\]", X, cu_seqlens=ints(0, 3, 6)),
    linear("context", TypeError, "NoneType", r"\[F, K\] or \[B, S, K\]", None),
    linear("context", ValueError, r"\[5\]", r"\[F, K\]", zeros(K)),
    linear("context", TypeError, "int64", "float32", zeros(B, K).long()),
    linear("context", TypeError, "bfloat16", "float64", zeros(B, K).bfloat16(), x=X.double()),
    linear("context", TypeError, "float64", "float32", zeros(B, K).double()),
    linear("context", TypeError, "float64", "float32 or bfloat16", zeros(B, K).double(), x=X.bfloat16()),
    linear("context", ValueError, "3 rows for 2 sequences", "context_index", zeros(3, K)),
    linear(
        "context",
        ValueError,
        "2 rows for 1 sequences",
        "one row per sequence",
        zeros(B, K),
        x=PACKED,
        cu_seqlens=ints(0, 7),
    ),
    linear("context", ValueError, "on meta", "cpu", zeros(B, K, device="meta")),
    linear("context", TypeError, "sparse", "strided", zeros(B, K).to_sparse()),
    linear("context", ValueError, r"\[2, 4, 5\]", r"\[2, 3, 5\]", zeros(B, 4, K)),
    linear("context", ValueError, r"\[1, 3, 5\]", r"\[2, 3, 5\]", zeros(1, S, K)),
    tokens("x", r"\[7, 4\]", r"\[B, S, D\]", x=PACKED),
    tokens("context_index", r"\[2, 3, 5\]", "None", context_index=index(0, 1)),
    tokens("cu_seqlens", r"\[2, 3, 5\]", "None", cu_seqlens=ints(0, 3, 6)),
    linear("bilinear", TypeError, "NoneType", r"\[D, E, K\]", None),
    linear("bilinear", ValueError, r"\[4, 30\]", r"\[D, E, K\]", zeros(D, E * K)),
    linear("bilinear", ValueError, r"\[3, 6, 5\]", r"\[4, 6, 5\]", zeros(3, E, K)),
    linear("bilinear", ValueError, r"\[4, 6, 4\]", r"\[4, 6, 5\]", zeros(D, E, 4)),
    linear("bilinear", TypeError, "float16", "float32 or bfloat16", zeros(D, E, K).half(), x=X.bfloat16()),
    linear("bilinear", ValueError, "on meta", "cpu", zeros(D, E, K, device="meta")),
    linear("weight", TypeError, "str", r"\[D, E\]", "w"),
    linear("weight", ValueError, r"\[6, 4\]", r"\[D, E\] = \[4, 6\]", zeros(E, D)),
    linear("weight", ValueError, r"\[4, 6, 1\]", r"\[D, E\]", zeros(D, E, 1)),
    linear("weight", TypeError, "int32", "float32", zeros(D, E).int()),
    linear("weight", ValueError, "on meta", "cpu", zeros(D, E, device="meta")),
    linear("bias", ValueError, r"\[4\]", r"\[E\] = \[6\]", zeros(D)),
    linear("bias", ValueError, r"\[1, 6\]", r"\[E\]", zeros(1, E)),
    linear("bias", TypeError, "float", r"tensor \[E\]", 1.0),
    linear("bias", TypeError, "int64", "float32", zeros(E).long()),
    linear("bias", ValueError, "on meta", "cpu", zeros(E, device="meta")),
    linear("context_index", TypeError, "list", r"tensor \[B\]", [0, 1]),
    linear("context_index", TypeError, "int32", "int64", ints(0, 1)),
    linear("context_index", TypeError, "float32", "int64", zeros(B)),
    linear("context_index", ValueError, r"\[3\]", r"\[B\] = \[2\]", index(0, 1, 0)),
    linear("context_index", ValueError, r"\[2, 1\]", r"\[B\]", index(0, 1)[:, None]),
    linear("context_index", ValueError, r"\[1\] is 2", "0 to 1", index(0, 2)),
    linear("context_index", ValueError, r"\[0\] is -1", "0 to 1", index(-1, 0)),
    linear("context_index", ValueError, r"\[1\] is 9", "0 to 1", index(0, 9), backend="reference"),
    linear("context_index", ValueError, r"\[0\] is -2", "0 to 1", index(-2, 0), backend="reference"),
    linear("context_index", ValueError, "on meta", "cpu", index(0, 1).to("meta")),
    packed(ValueError, "from 1 to 7", "0 to 7", ints(1, 3, 7)),
    packed(ValueError, "from 0 to 6", "0 to 7", ints(0, 3, 6)),
    packed(ValueError, "from 0 to 8", "0 to 7", ints(0, 3, 8)),
    packed(ValueError, "from 0 to 5", "0 to 7", ints(0, 3, 5), backend="reference"),
    packed(ValueError, r"\[2\] is 2 after 4", "non-decreasing", ints(0, 4, 2, 7), context=zeros(3, K)),
    packed(TypeError, "int64", "int32", index(0, 3, 7)),
    packed(TypeError, "list", r"\[B \+ 1\]", [0, 3, 7]),
    packed(ValueError, r"\[0\]", r"\[B \+ 1\]", ints()),
    packed(ValueError, r"\[1, 3\]", r"\[B \+ 1\]", ints(0, 3, 7)[None]),
    packed(ValueError, "on meta", "cpu", ints(0, 3, 7).to("meta")),
    linear("workspace_bytes", ValueError, "is 0", "positive", 0),
    linear("workspace_bytes", ValueError, "is -1", "positive", -1),
    linear("workspace_bytes", TypeError, "is 1.5", "positive", 1.5),
    linear("workspace_bytes", TypeError, "is True", "positive", True),
    linear("workspace_bytes", TypeError, "is '1M'", "positive", "1M"),
    linear("backend", ValueError, "'fast'", "'reference', 'portable'", "fast"),
    linear("backend", ValueError, "3", "None or one of", 3),
    linear("backend", ValueError, r"\['cpu'\]", "None or one of", ["cpu"]),
    qkv("weights", TypeError, "Tensor", "sequence of 3", weights=zeros(3, D, E)),
    qkv("weights", ValueError, "2 entries", "3", weights=[zeros(D, E)] * 2),
    qkv("bilinears", TypeError, "NoneType", "sequence of 3", bilinears=None),
    qkv("bilinears", ValueError, "4 entries", "3", bilinears=[zeros(D, E, K)] * 4),
    qkv("biases", ValueError, "1 entries", "3", biases=[None]),
    qkv(r"bilinears\[1\]", TypeError, "NoneType", r"\[D, E, K\]", bilinears=[WEIGHTS["bilinear"], None, None]),
    qkv(r"weights\[2\]", ValueError, r"\[6, 4\]", r"\[4, 6\]", weights=[None, None, zeros(E, D)]),
    qkv(r"biases\[0\]", ValueError, r"\[4\]", r"\[6\]", biases=[zeros(D), None, None]),
    qkv("workspace_bytes", ValueError, "is 0", "positive", workspace_bytes=0),
    qkv("context", ValueError, "3 rows", "context_index", context=zeros(3, K)),
    qkv("context_index", ValueError, r"\[0\] is 2", "0 to 1", context_index=index(2, 0)),
    explained("A", ValueError, r"\[2, 2, 5\]", r"\[b, r, D\]", A=zeros(B, R, D + 1)),
    explained("scale", TypeError, "'one'", "a number", scale="one"),
    lora("x", ValueError, r"\[4\]", r"\[B, S, D\]", x=zeros(D)),
    lora("x", ValueError, r"\[7, 4\]", "cu_seqlens", x=PACKED),
    lora("A", TypeError, "NoneType", r"\[b, r, D\]", A=None),
    lora("A", ValueError, r"\[2, 4\]", r"\[b, r, D\]", A=zeros(R, D)),
    lora("A", ValueError, r"\[2, 2, 3\]", r"\[2, 2, 4\]", A=zeros(B, R, 3)),
    lora("A", TypeError, "float64", "float32", A=zeros(B, R, D).double()),
    lora("A", ValueError, "3 rows for 2 sequences", "adapter_index", A=zeros(3, R, D), B=zeros(3, E, R)),
    lora("B", ValueError, r"\[2, 2, 6\]", r"\[2, 6, 2\]", B=zeros(B, R, E)),
    lora("B", ValueError, r"\[3, 6, 2\]", r"\[2, 6, 2\]", B=zeros(3, E, R)),
    lora("B", ValueError, "on meta", "cpu", B=zeros(B, E, R, device="meta")),
    lora("weight", ValueError, r"\[4, 6\]", r"\[6, 4\]|\[E, D\]|\[4, 4\]", weight=zeros(D, E)),
    lora("bias", ValueError, r"\[4\]", r"\[E\] = \[6\]", bias=zeros(D)),
    lora("scale", TypeError, "'1'", "number", scale="1"),
    lora("scale", TypeError, "True", "number", scale=True),
    lora("scale", ValueError, r"\[1\]", r"a number or \[b\] = \[2\]", scale=zeros(1)),
    lora("scale", TypeError, "float64", "float32", scale=zeros(B).double()),
    lora("scale", ValueError, "requires a gradient", "detach", scale=zeros(B).requires_grad_()),
    lora("ranks", TypeError, "list", r"\[b\]", ranks=[1, 2]),
    lora("ranks", TypeError, "int32", "int64", ranks=ints(1, 2)),
    lora("ranks", ValueError, r"\[1\]", r"\[b\] = \[2\]", ranks=index(1)),
    lora("ranks", ValueError, r"\[1\] is 3", "from 0 to 2", ranks=index(1, 3)),
    lora("ranks", ValueError, r"\[0\] is -1", "from 0 to 2", ranks=index(-1, 2), backend="reference"),
    lora("ranks", ValueError, r"\[1\] is -1", "from 0 to 2", ranks=index(2, -1), backend="portable"),
    lora("dropout", ValueError, "1", "from 0 to below 1", dropout=1.0),
    lora("dropout", TypeError, "'0.1'", "number", dropout="0.1"),
    lora("seed", TypeError, "1.5", "None, an int", dropout=0.5, seed=1.5),
    lora("seed", TypeError, "int32", "int64", dropout=0.5, seed=ints(1)),
    lora("seed", ValueError, r"\[2\]", "one element", dropout=0.5, seed=index(1, 2)),
    lora("adapter_index", ValueError, r"\[1\] is 2", r"-1 to 1 \(-1: none\)", adapter_index=index(0, 2)),
    lora("adapter_index", ValueError, r"\[1\] is -2", "-1 to 1", adapter_index=index(0, -2), backend="reference"),
    lora("adapter_index", ValueError, r"\[0\] is -2", "-1 to 1", adapter_index=index(-2, 0), backend="portable"),
    lora("adapter_index", ValueError, r"\[1\]", r"\[B\] = \[2\]", adapter_index=index(0)),
    lora("backend", ValueError, "'peft'", "None or one of", backend="peft"),
    packed(ValueError, "from 0 to 6", "0 to 7", ints(0, 3, 6), "lora_linear"),
    factored("in_factor", ValueError, r"\[4, 3\]", r"\[D, R\] = \[4, 2\]", in_factor=zeros(D, 3)),
    factored("in_factor", TypeError, "NoneType", r"\[D, R\]", in_factor=None),
    factored("context_factor", ValueError, r"\[4, 2\]", r"\[K, R\] = \[5, 2\]", context_factor=zeros(4, R)),
    factored("out_factor", ValueError, r"\[2\]", r"\[R, E\]", out_factor=zeros(R)),
    factored("weight", ValueError, r"\[6, 4\]", r"\[D, E\] = \[4, 6\]", weight=zeros(E, D)),
    factored("context_index", ValueError, r"\[0\] is -1", "0 to 1", context_index=index(-1, 0)),
    packed(ValueError, "from 0 to 6", "0 to 7", ints(0, 3, 6), "factored_modulated_linear"),
    Bad("bilinear", "input1", TypeError, "NoneType", r"\[\.\.\., D\]", {"input1": None}),
    Bad("bilinear", "input1", ValueError, r"\[\]", r"\[\.\.\., D\]", {"input1": zeros()}),
    Bad("bilinear", "input2", ValueError, r"leading dimensions \[3\]", r"\[2\]", {"input2": zeros(3, K)}),
    Bad("bilinear", "input2", TypeError, "float64", "float32", {"input2": zeros(B, K).double()}),
    Bad("bilinear", "weight", ValueError, r"\[6, 5, 4\]", r"\[6, 4, 5\]", {"weight": zeros(E, K, D)}),
    Bad("bilinear", "weight", ValueError, r"\[4, 5\]", r"\[E, D, K\]", {"weight": zeros(D, K)}),
    Bad("bilinear", "bias", ValueError, r"\[5\]", r"\[E\] = \[6\]", {"bias": zeros(K)}),
    Bad("explain", "context", ValueError, "3 rows", "context_index", {"context": zeros(3, K)}),
    Bad("explain", "workspace_bytes", ValueError, "is -5", "positive", {"workspace_bytes": -5}),
    Bad("explain", "context_index", ValueError, r"\[1\] is 2", "0 to 1", {"context_index": index(0, 2)}),
    Bad("explain", "backend", ValueError, "'best'", "None or one of", {"backend": "best"}),
    packed(ValueError, "from 0 to 6", "0 to 7", ints(0, 3, 6), "explain"),
]


def test_the_table_is_long_and_its_entries_distinct():
    assert len(TABLE) >= 110
    assert len({bad.id for bad in TABLE}) == len(TABLE)
    assert {bad.fn for bad in TABLE} == set(BASE)


def tensors_in(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            yield value


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_functions(bad):
    arguments = BASE[bad.fn] | bad.change
    before = [(t, t.clone(), t._version) for t in tensors_in(arguments.values())]
    with pytest.raises(bad.error) as raised:
        getattr(ctxkern, bad.fn)(**arguments)
    assert type(raised.value) is bad.error
    said = str(raised.value)
    assert said.startswith(f"{bad.fn}: ") or bad.argument == "backend" or "[" in bad.got or " to " in bad.got
    for pattern in (bad.argument, bad.got, bad.takes, "must"):
        assert re.search(pattern, said), f"{pattern!r} in {said!r}"
    for t, copy, version in before:
        assert torch.equal(t, copy)
        assert t._version == version


@pytest.mark.parametrize("fn", BASE)
def test_the_base_of_the_table_is_right(fn):
    getattr(ctxkern, fn)(**BASE[fn])


@pytest.mark.parametrize("name", [n for n, status in ctxkern.backends().items() if not status])
@pytest.mark.parametrize("fn", [name for name in BASE if name != "bilinear"])
def test_a_backend_that_is_not_there_never_falls_back(fn, name):
    with pytest.raises(RuntimeError, match=f"'{name}' cannot run here: .+"):
        getattr(ctxkern, fn)(**BASE[fn], backend=name)


def test_backends_say_why_they_are_not_there():
    found = ctxkern.backends()
    assert {"reference", "portable", "cpu", "triton", "cuda"} <= set(found)
    assert found["reference"]
    assert found["portable"]
    for status in found.values():
        assert bool(status) == (str(status) == "available")
        assert str(status)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", [None, "reference", *(b for b in ("portable", "cpu") if ctxkern.backends()[b])])
def test_values_are_checked_however_a_call_runs(grad, backend):
    arguments = BASE["modulated_linear"] | {"x": X.clone().requires_grad_(grad), "backend": backend}
    with pytest.raises(ValueError, match=r"context_index\[1\] is -1; it must be from 0 to 1"):
        ctxkern.modulated_linear(**arguments, context_index=index(0, -1))
    with pytest.raises(ValueError, match="cu_seqlens goes from 0 to 5; it must go from 0 to 7"):
        ctxkern.modulated_linear(**(arguments | {"x": PACKED}), cu_seqlens=ints(0, 3, 5))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_values_are_checked_under_transforms(transform):
    def loss(x):
        return ctxkern.modulated_linear(**(BASE["modulated_linear"] | {"x": x}), context_index=index(0, -1)).sum()

    with pytest.raises(ValueError, match=r"context_index\[1\] is -1; it must be from 0 to 1"):
        transform(loss)(X)


def test_values_that_a_transform_wraps_are_checked():
    def loss(x, index):
        return ctxkern.modulated_linear(**(BASE["modulated_linear"] | {"x": x}), context_index=index).sum()

    assert torch.func.grad(loss)(X, index(0, 1)).shape == X.shape
    with pytest.raises(ValueError, match=r"context_index\[0\] is 2; it must be from 0 to 1"):
        torch.func.grad(loss)(X, index(2, 0))
    several = torch.func.vmap(loss, (None, 0))(X, torch.stack((index(0, 1), index(1, 0))))
    assert several.shape == (2,)

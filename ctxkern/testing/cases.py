"""The case table: one list of named problems for tests and benchmarks, and how their tensors are made."""

from dataclasses import dataclass, fields, replace

import torch

from ctxkern.dtypes import HALVES, KERNEL_FLOATS, SHORT


@dataclass(frozen=True)
class Case:
    """One modulated projection. `rows` F of the context table, used by `index`; `lengths` makes it packed.

    x_layout: contiguous, strided (every other column of a wider tensor) or expanded (one sequence for all).
    bilinear_layout: contiguous, permuted ([E, D, K] in memory), strided (a slice of a larger K) or expanded (over D).
    """

    id: str
    B: int
    S: int
    D: int
    E: int
    K: int
    rows: int | None = None
    index: tuple | None = None
    lengths: tuple | None = None
    per_token: bool = False
    weight: bool = True
    bias: bool = False
    x_layout: str = "contiguous"
    bilinear_layout: str = "contiguous"

    @property
    def tokens(self):
        return sum(self.lengths) if self.lengths is not None else self.B * self.S

    @property
    def contexts(self):
        """U: distinct contexts with at least one token's sequence."""
        if self.per_token:
            return self.tokens
        return len(set(self.index)) if self.index is not None else self.B


# dtypes of the activations and of the parameters
DTYPES = {SHORT[dtype]: (dtype, dtype) for dtype in KERNEL_FLOATS} | {
    f"{SHORT[half]}-f32-params": (half, torch.float32) for half in HALVES
}

_SHARED = (3, 0, 3, 1, 3, 0, 1, 3)

CASES = [
    Case("one", 1, 1, 1, 1, 1),
    Case("tiny", 2, 3, 4, 5, 2, bias=True),
    Case("odd", 3, 5, 7, 9, 3, bias=True),
    Case("prime", 5, 13, 31, 29, 11),
    Case("non-power-of-two", 6, 20, 48, 96, 24, bias=True),
    Case("wide-k", 3, 10, 12, 8, 130),
    Case("narrow-k", 4, 40, 24, 16, 1),
    Case("debug", 4, 32, 64, 64, 16),
    Case("deep", 2, 6, 1031, 3, 8),
    Case("single-context", 1, 64, 32, 32, 8, bias=True),
    Case("many-sequences-of-one-context", 8, 6, 20, 12, 5, rows=1, index=(0,) * 8),
    Case("shared-uneven", 8, 5, 18, 14, 6, rows=4, index=_SHARED, bias=True),
    Case("shared-uneven-wide-k", 8, 5, 18, 14, 48, rows=4, index=_SHARED, bias=True),
    Case("shared-even-wide-k", 6, 7, 16, 10, 48, rows=3, index=(2, 0, 1, 1, 2, 0)),
    Case("shared-even", 6, 7, 16, 16, 4, rows=3, index=(2, 0, 1, 1, 2, 0)),
    Case("reversed-index", 4, 9, 10, 12, 3, rows=4, index=(3, 2, 1, 0)),
    Case("table-larger-than-batch", 3, 8, 12, 10, 4, rows=50, index=(41, 7, 41)),
    Case("no-weight", 4, 11, 13, 17, 5, weight=False, bias=True),
    Case("decode", 16, 1, 32, 48, 12),
    Case("two-tokens", 12, 2, 16, 24, 8),
    Case("context-per-token", 3, 7, 12, 10, 6, per_token=True, bias=True),
    Case("context-per-token-no-weight", 2, 33, 20, 9, 4, per_token=True, weight=False),
    Case("ragged", 5, 0, 16, 12, 4, lengths=(3, 1, 17, 8, 30), bias=True),
    Case("ragged-empty-sequences", 6, 0, 9, 11, 5, lengths=(0, 4, 0, 13, 1, 0)),
    Case(
        "ragged-shared", 7, 0, 14, 10, 6, rows=3, index=(2, 0, 2, 1, 0, 2, 2), lengths=(5, 2, 0, 9, 4, 1, 6), bias=True
    ),
    Case("ragged-equal", 4, 0, 8, 8, 3, rows=9, index=(8, 1, 3, 2), lengths=(6, 6, 6, 6)),
    Case("strided-x", 4, 6, 10, 8, 4, x_layout="strided"),
    Case("expanded-x", 5, 6, 12, 8, 4, x_layout="expanded", bias=True),
    Case("permuted-bilinear", 4, 12, 10, 14, 6, bilinear_layout="permuted"),
    Case("strided-bilinear", 4, 12, 10, 14, 6, bilinear_layout="strided"),
    Case("expanded-bilinear", 3, 8, 6, 9, 4, bilinear_layout="expanded"),
    Case("permuted-bilinear-per-token", 2, 9, 8, 7, 5, per_token=True, bilinear_layout="permuted"),
    Case("empty-batch", 0, 4, 6, 5, 3, bias=True),
    Case("empty-sequences", 3, 0, 6, 5, 3),
    Case("empty-d-in", 2, 3, 0, 5, 3, bias=True),
    Case("empty-d-out", 2, 3, 6, 0, 3, bias=True),
    Case("empty-context", 2, 3, 6, 5, 0, bias=True),
    Case("empty-context-per-token", 2, 3, 6, 5, 0, per_token=True),
    Case("empty-packed", 2, 0, 6, 5, 3, lengths=(0, 0)),
]

BENCH_CASES = [
    Case("debug", 4, 32, 64, 64, 16),
    Case("small", 16, 128, 256, 256, 32),
    Case("base", 32, 128, 512, 512, 64),
    Case("large", 8, 512, 1024, 1024, 64),
    Case("long-shared", 32, 256, 512, 512, 64, rows=4, index=tuple(i % 4 for i in range(32))),
    Case("gqa-width", 16, 256, 512, 128, 64),
    Case("odd", 13, 97, 385, 391, 47),
    Case("ragged", 16, 0, 512, 512, 64, lengths=tuple(37 + 13 * i for i in range(16))),
    Case("decode", 32, 1, 512, 512, 64),
    Case("context-per-token", 4, 128, 256, 256, 32, per_token=True),
]


@dataclass
class Inputs:
    """The tensors of a case; `dy` is the gradient of the output."""

    x: torch.Tensor
    context: torch.Tensor
    weight: torch.Tensor | None
    bilinear: torch.Tensor
    bias: torch.Tensor | None
    context_index: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    dy: torch.Tensor

    PARAMETERS = ("x", "context", "weight", "bilinear", "bias")

    def arguments(self):
        """(positional, keyword) arguments of `modulated_linear`."""
        positional = tuple(getattr(self, name) for name in self.PARAMETERS)
        return positional, {"context_index": self.context_index, "cu_seqlens": self.cu_seqlens}

    def map(self, fn):
        """The same with fn over every floating tensor."""
        mapped = {}
        for field in fields(self):
            t = getattr(self, field.name)
            mapped[field.name] = fn(t) if t is not None and t.is_floating_point() else t
        return Inputs(**mapped)

    def leaves(self):
        """The same as leaves of autograd with their own layouts, `dy` apart."""
        made = self.map(lambda t: t.detach().requires_grad_())
        return replace(made, dy=self.dy)


def make_inputs(case, dtype=torch.float32, param_dtype=None, device="cpu", seed=0):
    """Normal tensors scaled as in a trained layer: outputs near 1. `param_dtype`: of all but x, dtype by default.

    Those of a seed are the same wherever the device is the same.
    """
    drawn = device if torch.device(device).type == "cuda" else "cpu"
    generator = torch.Generator(drawn).manual_seed(seed)
    param_dtype = param_dtype or dtype
    B, S, D, E, K = case.B, case.S, case.D, case.E, case.K

    def normal(*shape, scale=1.0, to=param_dtype):
        if str(device) == "meta":
            return torch.empty(*shape, dtype=to, device=device)
        drawn_in = {"generator": generator, "dtype": torch.float64, "device": drawn}
        return (torch.randn(*shape, **drawn_in) * scale).to(device, to)

    lead = (case.tokens,) if case.lengths is not None else (B, S)
    table = (B, S, K) if case.per_token else (case.rows if case.rows is not None else B, K)
    index = None if case.index is None else torch.tensor(case.index, dtype=torch.int64, device=device)
    bounds = None
    if case.lengths is not None:
        bounds = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return Inputs(
        _x(case, normal, lead, dtype),
        normal(*table),
        normal(D, E, scale=max(D, 1) ** -0.5) if case.weight else None,
        _bilinear(case, normal),
        normal(E) if case.bias else None,
        index,
        bounds,
        normal(*lead, E, to=dtype),
    )


def _x(case, normal, lead, dtype):
    if case.x_layout == "strided":
        return normal(*lead, 2 * case.D, to=dtype)[..., ::2]
    if case.x_layout == "expanded":
        return normal(1, *lead[1:], case.D, to=dtype).expand(*lead, case.D)
    return normal(*lead, case.D, to=dtype)


def _bilinear(case, normal):
    D, E, K = case.D, case.E, case.K
    scale = max(D * K, 1) ** -0.5
    if case.bilinear_layout == "permuted":
        return normal(E, D, K, scale=scale).permute(1, 0, 2)
    if case.bilinear_layout == "strided":
        return normal(D, E, 2 * K, scale=scale)[:, :, K:]
    if case.bilinear_layout == "expanded":
        return normal(1, E, K, scale=scale).expand(D, E, K)
    return normal(D, E, K, scale=scale)

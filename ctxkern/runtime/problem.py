"""What compiled kernels are given: csrc/problem.h, field by field. Both layouts are compared as a library is loaded.

A field that is not set is zero, so absent. Sizes and strides count elements.
"""

import ctypes

_int = ctypes.c_int64


class Operand(ctypes.Structure):
    """A tensor: its address, 0 where it is absent or empty, the code of its dtype, a stride per dimension."""

    # `strides[3]` in C: one field each, as setting an array from Python takes four times as long
    _fields_ = [("data", _int), ("dtype", ctypes.c_int32), ("stride0", _int), ("stride1", _int), ("stride2", _int)]


class Batch(ctypes.Structure):
    """Which row of a table each row of x uses. bounds, index: addresses, or 0."""

    _fields_ = [(name, _int) for name in ("bounds", "index", "tokens", "sequences", "length", "table")]


class Projection(ctypes.Structure):
    """weight [D, E], bilinear [D, E, K], bias [E], gradients; rows: address of y in a forward, of dy in a backward."""

    _fields_ = [
        ("d_out", _int),
        *((name, Operand) for name in ("weight", "bilinear", "bias")),
        ("rows", _int),
        *((name, Operand) for name in ("dweight", "dbilinear")),
    ]


class LoraProblem(ctypes.Structure):
    """A low-rank call. rows: address of y in a forward, of dy in a backward; dx, dA, dB, ranks, scales, seed, gates,
    gate_of and products: addresses."""

    _fields_ = [
        ("batch", Batch),
        *((name, Operand) for name in ("x", "A", "B")),
        *((name, _int) for name in ("ranks", "scales", "rows", "dx", "dA", "dB")),
        *((name, _int) for name in ("d_in", "d_out", "rank", "threads", "tf32", "adds")),
        ("scale", ctypes.c_double),
        *((name, _int) for name in ("kept_from", "seed", "gates", "gate_rows", "gate_of", "products")),
    ]


MOST_PROJECTIONS = 3


class Problem(ctypes.Structure):
    """A modulated call. dx, dcontext: addresses; outer_above: distinct contexts above which the outer form runs."""

    _fields_ = [
        ("batch", Batch),
        *((name, Operand) for name in ("x", "context")),
        *(
            (name, _int)
            for name in ("dx", "dcontext", "d_in", "context_dim", "projections", "workspace_bytes", "threads", "tf32")
        ),
        ("outer_above", ctypes.c_double),
        ("projection", Projection * MOST_PROJECTIONS),
    ]


# of what functions of the libraries take (csrc/problem_checks.h)
_CALLS = 4


def layout():
    """The text that `problem_layout` of a library must give."""
    lines = [f"calls {_CALLS}\n"]
    for struct in (Operand, Batch, Projection, Problem, LoraProblem):
        lines.append(f"{struct.__name__} {ctypes.sizeof(struct)}\n")
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            if name in ("stride1", "stride2"):
                continue
            lines.append(f"{struct.__name__}.{name.replace('stride0', 'strides')} {field.offset}\n")
    return "".join(lines)


def difference(found):
    """How the layout that a library gives differs from `layout()`, or ""."""
    if found == layout():
        return ""
    pairs = zip(found.splitlines(), layout().splitlines(), strict=False)
    where = next((f"{theirs} there, {ours} here" for theirs, ours in pairs if theirs != ours), "in length")
    return f"it was built from other sources ({where})"

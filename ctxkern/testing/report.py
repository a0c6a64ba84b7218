"""One measured case as rows, a readable table of them, and the file that they are appended to."""

import csv
from pathlib import Path
from statistics import geometric_mean, median

from ctxkern.dtypes import name_of
from ctxkern.functional import explain

from .measure import Ceilings, ceilings, interleaved, large_product, peak_extra_bytes, provenance, times
from .oracle import check
from .peers import calls, forms

COLUMNS = (
    "date device threads torch triton commit dirty case B S D E K U tokens dtype param_dtype pass peer "
    "p20_ms p50_ms p80_ms rounds speedup_over_einsum price_over_linear gflops gbs floor_share peak_extra_mib "
    "floor_ms strategy"
).split()


def measure_case(case, inputs, backward, *, compiled=False, seconds=1.0, peaks=None, only=None):
    """Rows of a case, one per peer: raises AssertionError, and measures nothing, where ctxkern's result is wrong.

    peaks: `Ceilings` of this run, measured where None. The rate of products is measured again right before and after
    the peers, so that a slow moment meets the floor as well, but not in turn with them: small calls would find the
    caches empty. only: names of peers to keep.
    """
    check(forms(inputs)["ctxkern"], inputs, case.id)
    device, dtype = inputs.x.device, inputs.x.dtype
    run = {k: v for k, v in calls(inputs, backward, compiled).items() if only is None or k in only}
    peaks = peaks or ceilings(dtype, device)
    products, flops = large_product(dtype, device)
    around = times(products, device)
    timings = interleaved(run, seconds, device=device)
    around += times(products, device)
    peaks = Ceilings(flops / median(around), peaks.bandwidth)
    memory = {name: peak_extra_bytes(fn, device) for name, fn in run.items()}
    return rows_of(case, inputs, backward, timings, memory, peaks)


def rows_of(case, inputs, backward, timings, memory, peaks):
    """Rows of a case from the `Timing` of each peer and its peak of extra bytes; "linear" has a floor by itself."""
    device, dtype = inputs.x.device, inputs.x.dtype
    positional, keyword = inputs.arguments()
    plan = explain(*positional, **keyword, backward=backward)
    counts, of_linear = _counts(plan, inputs, backward), _linear_counts(inputs, backward)
    common = {
        **provenance(device),
        "case": case.id,
        "B": case.B,
        "S": case.S,
        "D": case.D,
        "E": case.E,
        "K": case.K,
        "U": case.contexts,
        "tokens": case.tokens,
        "dtype": name_of(dtype),
        "param_dtype": name_of(inputs.bilinear.dtype),
        "pass": "forward+backward" if backward else "forward",
    }
    rows = []
    for name, timing in timings.items():
        seconds_each = timing.p50
        flops, moved = of_linear if name == "linear" else counts
        floor = peaks.floor(flops, moved)
        rows.append(
            {
                **common,
                "peer": name,
                "p20_ms": f"{timing.p20 * 1e3:.4f}",
                "p50_ms": f"{timing.p50 * 1e3:.4f}",
                "p80_ms": f"{timing.p80 * 1e3:.4f}",
                "rounds": timing.rounds,
                "speedup_over_einsum": _ratio(timings.get("einsum"), timing),
                "price_over_linear": _ratio(timing, timings.get("linear")),
                "gflops": f"{flops / seconds_each / 1e9:.1f}",
                "gbs": f"{moved / seconds_each / 1e9:.2f}",
                "floor_share": f"{floor / seconds_each:.3f}",
                "floor_ms": f"{floor * 1e3:.4f}",
                "peak_extra_mib": f"{memory[name] / 2**20:.2f}",
                "strategy": plan.strategy if name == "ctxkern" else "",
            }
        )
    return rows


def _counts(plan, inputs, backward):
    """(flops, bytes) that the work itself asks for, whoever does it: each operand once, each result once."""
    flops, moved = min(plan.flops, _panel_flops(plan)), plan.bytes
    if not backward:
        return flops, moved
    parameters = sum(t.numel() * t.element_size() for t in inputs.arguments()[0][1:] if t is not None)
    return 3 * flops, 2 * moved + parameters


def _linear_counts(inputs, backward):
    """The same of a linear layer on the same x, which shows what a library reaches at this size."""
    x, _, weight, bilinear, bias = inputs.arguments()[0]
    d_in, d_out = bilinear.shape[:2]
    tokens = x.numel() // d_in if d_in else 0
    parameters = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    flops, moved = 2 * tokens * d_in * d_out, tokens * (d_in + d_out) * x.element_size() + parameters
    return (3 * flops, 2 * moved + parameters) if backward else (flops, moved)


def _panel_flops(plan):
    return 2 * plan.tokens * plan.d_in * plan.d_out + 2 * plan.contexts * plan.d_in * plan.d_out * plan.context_dim


def _ratio(a, b):
    return "" if a is None or b is None else f"{a.p50 / b.p50:.3f}"


_TABLE = (
    ("peer", "peer", "<"),
    ("p50_ms", "median ms", ">"),
    ("p20_ms", "p20", ">"),
    ("p80_ms", "p80", ">"),
    ("speedup_over_einsum", "× einsum", ">"),
    ("price_over_linear", "price", ">"),
    ("gflops", "GFLOP/s", ">"),
    ("gbs", "GB/s", ">"),
    ("floor_share", "of floor", ">"),
    ("peak_extra_mib", "peak MiB", ">"),
)


def table(rows):
    """The rows as text, a block for each case, dtype and pass. "price" is over one plain shared linear layer."""
    lines, last = [], None
    for row in rows:
        head = (row["case"], row["dtype"], row["param_dtype"], row["pass"])
        if head != last:
            lines += ["", _headline(row), _line({key: title for key, title, _ in _TABLE})]
            last = head
        lines.append(_line(row))
    return "\n".join(lines[1:])


def _headline(row):
    mixed = "" if row["param_dtype"] == row["dtype"] else f" with {row['param_dtype']} parameters"
    sizes = " ".join(f"{name}={row[name]}" for name in ("B", "S", "D", "E", "K", "U"))
    return f"{row['case']}: {sizes}, {row['dtype']}{mixed}, {row['pass']} (floor {float(row['floor_ms']):.3g} ms)"


def _line(row):
    return "  ".join(f"{row[key]!s:{align}{18 if key == 'peer' else 10}}" for key, _, align in _TABLE)


_PLAIN = ("ctxkern", "einsum", "linear")


def means(rows):
    """Lines: by dtypes and pass, the geometric mean over the cases of the speed over the einsum's and over that of the
    best other peer (the einsum where there is none), and the case where the latter is least."""
    blocks = {}
    for row in rows:
        kind = (row["dtype"], row["param_dtype"], row["pass"])
        blocks.setdefault(kind, {}).setdefault(row["case"], {})[row["peer"]] = float(row["p50_ms"])
    lines = []
    for (dtype, param_dtype, direction), cases in blocks.items():
        einsum, best = {}, {}
        for case, ms in cases.items():
            if "einsum" not in ms or "ctxkern" not in ms:
                continue
            einsum[case] = ms["einsum"] / ms["ctxkern"]
            others = [t for p, t in ms.items() if p not in _PLAIN and not p.startswith("ctxkern")]
            best[case] = min(others or [ms["einsum"]]) / ms["ctxkern"]
        if not best:
            continue
        least = min(best, key=best.get)
        name = dtype if dtype == param_dtype else f"{dtype} with {param_dtype} parameters"
        lines.append(
            f"{name}, {direction}: {geometric_mean(einsum.values()):.2f} × the einsum, "
            f"{geometric_mean(best.values()):.2f} × the best PyTorch form over {len(best)} cases; "
            f"least {best[least]:.2f} at {least}"
        )
    return lines


def family_rows(case, dtype, run, seconds):
    """Rows of a case that is a named tuple of sizes, one per peer of run = {name: callable}, and their peaks."""
    memory = {name: peak_extra_bytes(fn) for name, fn in run.items()}
    return [
        {
            **provenance(),
            **case._asdict(),
            "dtype": name_of(dtype),
            "peer": name,
            "p20_ms": f"{timing.p20 * 1e3:.4f}",
            "p50_ms": f"{timing.p50 * 1e3:.4f}",
            "p80_ms": f"{timing.p80 * 1e3:.4f}",
            "peak_mib": f"{memory[name] / 2**20:.1f}",
        }
        for name, timing in interleaved(run, seconds).items()
    ]


def append(rows, path, columns=COLUMNS):
    """Appends rows to a CSV file, with a header where it is new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def results_file(device="cpu", root="bench/results"):
    """bench/results/<device>.csv below the current folder, where the tree has it; None elsewhere."""
    root = Path(root)
    if not root.is_dir():
        return None
    name = provenance(device)["device"].lower()
    return root / ("-".join("".join(c if c.isalnum() else " " for c in name).split()) + ".csv")

"""Writes the tables of bench/README.md from the rows under bench/results: `python bench/tables.py`, or `--check`.

A table stands between `<!-- table: FILE -->` and `<!-- end -->`; it holds the newest row of each case, dtype and pass.
"""

import argparse
import csv
import re
from pathlib import Path
from statistics import geometric_mean

PAGE = Path(__file__).with_name("README.md")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEAD = (
    "| case: B×S, D→E | dtype | ms: fwd \\| fwd+bwd | × einsum | × best PyTorch form | price over linear, fwd "
    "| temporary MiB, fwd+bwd: ctxkern \\| einsum | of the floor, fwd+bwd: ctxkern \\| linear |\n"
    "|---|---|---|---|---|---|---|---|"
)
PASSES = ("forward", "forward+backward")
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OURS = ("ctxkern", "einsum", "linear")
# by family: peers that are no form of the same computation
_NO_FORM = {"lora": ("linear", "one by one", "PEFT", "PEFT in turn"), "factored": ("linear", "bilinear")}


def newest(path):
    """{(case, dtype, param_dtype): {pass: {peer: row}}} of the last run of each."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = row["case"], row["dtype"], row["param_dtype"]
            runs = found.setdefault(key, {}).setdefault(row["pass"], {})
            if row["peer"] == "ctxkern":
                runs.clear()
            runs[row["peer"]] = row
    return found


def _ms(peers, name):
    return float(peers[name]["p50_ms"]) if name in peers else None


def _best(peers):
    others = [float(row["p50_ms"]) for peer, row in peers.items() if peer not in _OURS and "compile" not in peer]
    return min(others) if others else None


def ratios(peers):
    """(over the einsum, over the best other PyTorch form) of a pass; None where there is none."""
    mine, einsum, best = _ms(peers, "ctxkern"), _ms(peers, "einsum"), _best(peers)
    return einsum and einsum / mine, best and best / mine


def _pair(values, form):
    return " \\| ".join("–" if value is None else form(value) for value in values)


def markdown(path):
    """The table of a file, and a line of geometric means by dtype."""
    lines, means = [HEAD], {}
    for (_, dtype, param_dtype), passes in newest(path).items():
        if not all("ctxkern" in passes.get(name, {}) for name in PASSES):
            continue
        forward, both = (passes[name] for name in PASSES)
        row = forward["ctxkern"]
        kind = SHORT[dtype] if dtype == param_dtype else f"{SHORT[dtype]}, {SHORT[param_dtype]} parameters"
        speeds = [ratios(forward), ratios(both)]
        for at, (einsum, best) in enumerate(speeds):
            means.setdefault(kind, ([], [], [], []))
            means[kind][at].append(einsum)
            means[kind][2 + at].append(best or einsum)
        memory = [float(both[peer]["peak_extra_mib"]) if peer in both else None for peer in ("ctxkern", "einsum")]
        shares = [float(both.get(peer, {}).get("floor_share") or 0) or None for peer in ("ctxkern", "linear")]
        cells = (
            f"{row['case']}: {row['B']}×{row['S']}, {row['D']}→{row['E']}, K={row['K']}, U={row['U']}",
            kind,
            _pair([_ms(forward, "ctxkern"), _ms(both, "ctxkern")], lambda ms: f"{ms:.3g}"),
            _pair([einsum for einsum, _ in speeds], lambda x: f"{x:.2f}"),
            _pair([best for _, best in speeds], lambda x: f"{x:.2f}"),
            "–" if not row["price_over_linear"] else f"{float(row['price_over_linear']):.1f}",
            _pair(memory, lambda mib: "< 1" if mib < 1 else f"{mib:.1f}"),
            _pair(shares, lambda share: f"{share:.2f}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for kind, (ef, eb, bf, bb) in means.items():
        lines.append(
            f"- {kind}, geometric means over {len(ef)} cases, forward | forward + backward: "
            f"{geometric_mean(ef):.2f} | {geometric_mean(eb):.2f} times as fast as the einsum, "
            f"{geometric_mean(bf):.2f} | {geometric_mean(bb):.2f} times as fast as the best PyTorch form"
        )
    return "\n".join(lines) + "\n"


FACTORED_HEAD = (
    "| contexts × rows, width, K, rank | dtype | ms, fwd+bwd | × plain | × best form | price over linear "
    "| × whole tensor | temporary MiB: ctxkern \\| plain |\n|---|---|---|---|---|---|---|---|"
)
LORA_HEAD = (
    "| adapters × rows, width, rank | dtype | ms, fwd+bwd | best PyTorch form | × | × one by one | price over linear "
    "| temporary MiB: ctxkern \\| best |\n|---|---|---|---|---|---|---|---|"
)


def last_runs(path, *names):
    """{values of the named columns: {peer: row}} of the last run of each case."""
    runs = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            peers = runs.setdefault(tuple(row[name] for name in names), {})
            if row["peer"] == "ctxkern":
                peers.clear()
            peers[row["peer"]] = row
    return runs


def best_form(family, ms):
    """The fastest peer that computes the same, of ms = {peer: time}."""
    return min((peer for peer in ms if peer not in ("ctxkern", *_NO_FORM[family])), key=ms.get)


def factored_markdown(path):
    """The table of a file of bench_factored.py, and the geometric means by dtype."""
    lines, speeds = [FACTORED_HEAD], {}
    for (contexts, rows, d, k, rank, dtype), peers in last_runs(
        path, "contexts", "rows", "d", "context_dim", "rank", "dtype"
    ).items():
        ms = {peer: float(row["p50_ms"]) for peer, row in peers.items()}
        best = best_form("factored", ms)
        speeds.setdefault(SHORT[dtype], []).append((ms["plain"] / ms["ctxkern"], ms[best] / ms["ctxkern"]))
        cells = (
            f"{contexts} × {rows}, {d}, K={k}, {rank}",
            SHORT[dtype],
            f"{ms['ctxkern']:.3g}",
            f"{ms['plain'] / ms['ctxkern']:.2f}",
            f"{best} {ms[best] / ms['ctxkern']:.2f}",
            f"{ms['ctxkern'] / ms['linear']:.2f}",
            f"{ms['bilinear'] / ms['ctxkern']:.1f}",
            _pair([float(peers[peer]["peak_mib"]) for peer in ("ctxkern", "plain")], lambda mib: f"{mib:.1f}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for kind, each in speeds.items():
        plain, best = (geometric_mean(column) for column in zip(*each, strict=True))
        lines.append(
            f"- {kind}: {plain:.2f} times as fast as plain PyTorch, {best:.2f} as the best form written by hand"
        )
    return "\n".join(lines) + "\n"


def lora_markdown(path):
    """The table of a file of bench_lora.py, and the geometric mean by dtype."""
    lines, speeds = [LORA_HEAD], {}
    for (adapters, rows, d, rank, dtype), peers in last_runs(path, "adapters", "rows", "d", "rank", "dtype").items():
        ms = {peer: float(row["p50_ms"]) for peer, row in peers.items()}
        best = best_form("lora", ms)
        speeds.setdefault(SHORT[dtype], []).append(ms[best] / ms["ctxkern"])
        cells = (
            f"{adapters} × {rows}, {d}, {rank}",
            SHORT[dtype],
            f"{ms['ctxkern']:.3g}",
            f"{best} {ms[best]:.3g}",
            f"{ms[best] / ms['ctxkern']:.2f}",
            f"{ms['one by one'] / ms['ctxkern']:.1f}",
            f"{ms['ctxkern'] / ms['linear']:.2f}",
            _pair([float(peers[peer]["peak_mib"]) for peer in ("ctxkern", best)], lambda mib: f"{mib:.1f}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for kind, each in speeds.items():
        lines.append(
            f"- {kind}: {geometric_mean(each):.2f} times as fast as the best PyTorch form over {len(each)} cases"
        )
    return "\n".join(lines) + "\n"


TABLES = {"lora": lora_markdown, "factored": factored_markdown}


def filled(text):
    """The page with its tables made from the rows."""

    def made(match):
        table = TABLES.get(Path(match[2]).name.partition("-")[0], markdown)
        return match[1] + table(PAGE.parent / match[2]) + match[4]

    return TABLE.sub(made, text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page and the rows disagree")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    if args.check:
        return int(filled(text) != text)
    PAGE.write_text(filled(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

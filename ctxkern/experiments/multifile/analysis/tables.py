"""The tables of a report, each shown on the page and written as CSV."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.multifile.analysis.analyse import Analysis
from ctxkern.experiments.multifile.analysis.losses import OWN
from ctxkern.experiments.multifile.analysis.measures import Null, sign_flips
from ctxkern.experiments.multifile.analysis.summary import key_figures

Cell = str | int | float


@dataclass
class Table:
    """Rows under heads; `name` is that of its CSV file without suffix."""

    name: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def write(self, folder: str | os.PathLike) -> None:
        """As `folder`/`name`.csv; nan as an empty cell."""
        rows = [dict(zip(self.heads, row, strict=True)) for row in self.rows]
        write_csv_atomic(os.path.join(folder, f"{self.name}.csv"), rows, self.heads)


def family_order(a: Analysis) -> list[int]:
    """File ids by family: large families first, then the files that are alone."""
    sizes = a.families.known
    order = {name: number for number, name in enumerate(sizes)}
    return sorted(range(len(a.names)), key=lambda i: (order.get(a.families.names[i], len(order)), i))


def files(a: Analysis) -> Table:
    """Each file's family and movement, by family."""
    sizes = a.families.known
    rows: list[list[Cell]] = [
        [a.names[i], a.families.names[i] if a.families.names[i] in sizes else "", float(a.moved[i])]
        for i in family_order(a)
    ]
    return Table("files", ["file", "family", "movement"], rows)


def swaps(a: Analysis) -> Table:
    """Validation loss of each file in its own context, and the change in others."""
    s = a.swaps
    assert s is not None
    heads = ["file", "windows", "own"]
    for kind in list(s.kinds)[1:]:
        heads += [kind, "from", "to"]
    rows: list[list[Cell]] = []
    for number, i in enumerate(s.files):
        row: list[Cell] = [a.names[i], s.windows[number], float(s.kinds[OWN].loss[number])]
        for swap in list(s.kinds.values())[1:]:
            row += [float(swap.rise[number]), *swap.bounds[number].tolist()]
        rows.append(row)
    means: list[Cell] = ["mean over files", sum(s.windows), float(s.kinds[OWN].loss.mean())]
    for swap in list(s.kinds.values())[1:]:
        means += [swap.mean, swap.low, swap.high]
    return Table("losses", heads, [*rows, means])


def exact(a: Analysis) -> Table | None:
    """Share of right answers of each file in each kind of context, where there are answers."""
    s = a.swaps
    if s is None or not torch.isfinite(s.kinds[OWN].exact).any():
        return None
    rows: list[list[Cell]] = [
        [a.names[i], *(float(swap.exact[n]) for swap in s.kinds.values()), a.majority.get(a.names[i], math.nan)]
        for n, i in enumerate(s.files)
    ]
    columns = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    means: list[Cell] = ["mean over files", *columns.nanmean(0).tolist()]
    return Table("exact_match", ["file", *s.kinds, "majority answer"], [*rows, means])


def purity(a: Analysis) -> Table:
    """Purity in both spaces against its nulls."""
    heads = [
        *("space", "k", "purity", "permuted mean", "permuted 95 %", "p, permuted"),
        *("random mean", "random 95 %", "p, random", "at step 0"),
    ]
    rows: list[list[Cell]] = [
        [p.space, p.k, p.labels.observed, *_null(p.labels), *_null(p.random), p.start] for p in a.purities
    ]  # fmt: skip
    return Table("purity", heads, rows)


def _null(null: Null) -> list[float]:
    return [null.mean, null.high, null.p]


def attention(a: Analysis) -> Table:
    """The divergences of attention against their nulls, trained and at step 0."""
    heads = ["model", "question", "divergence", "null mean", "null 95 %", "p"]
    rows: list[list[Cell]] = []
    for name, d in (("trained", a.attention), ("step 0", a.attention_start)):
        if d is None:
            continue
        rows.append([name, "own and other contexts, against random vectors", d.trained, d.random, math.nan, d.p])
        rows.append([name, "own context on own input, against contexts dealt at random", d.own.observed, *_null(d.own)])
        if d.families:
            text = "between less within families, against permuted labels"
            rows.append([name, text, d.families.observed, *_null(d.families)])
    return Table("attention", heads, rows)


def projections(a: Analysis) -> Table:
    """Size and rank of the modulation by layer and projection."""
    heads = [
        *("projection", "‖ΔW‖ / ‖W‖", "at step 0", "effective rank", "at step 0", "participation ratio", "at step 0"),
    ]
    return Table(
        "projections", heads, [[p.name, *p.change, *p.entropy_rank, *p.participation] for p in a.projections]
    )  # fmt: skip


def matrix(name: str, a: Analysis, values: torch.Tensor, ids: Sequence[int]) -> Table:
    """A matrix over files, as CSV."""
    names = [a.names[i] for i in ids]
    return Table(name, ["file", *names], [[n, *row] for n, row in zip(names, values.tolist(), strict=True)])


def over_runs(analyses: Sequence[Analysis]) -> Table:
    """Key figures over runs: mean, range, and for what should exceed 0 the p value of a sign-flip test over seeds (one
    run is one pair; n runs cannot give less than 2⁻ⁿ)."""
    each = [key_figures(a) for a in analyses]
    rows: list[list[Cell]] = []
    for name in each[0]:
        values = torch.tensor([found.get(name, math.nan) for found in each], dtype=torch.float64)
        tested = any(word in name for word in ("above", "rise"))
        p = sign_flips(values, torch.Generator()) if tested and values.isfinite().all() else math.nan
        rows.append([name, float(values.mean()), float(values.min()), float(values.max()), p])
    return Table("over_runs", ["figure", "mean over runs", "lowest", "highest", "p over runs"], rows)

"""What the rows of a sweep say: gaps between the two minima, where they change sign, and theory next to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.positional.config import SweepSettings, TaskSettings
from ctxkern.experiments.positional.published import COLUMNS, POINTS
from ctxkern.experiments.positional.sweep import Row, read_rows
from ctxkern.experiments.positional.theory import BRANCHES, Solution, Task, Theory, crossing, follow

_RESAMPLES = 1000
MEASURED = ("test_error", "train_error", "train_loss", "m", "theta", "norm", "linear_test_error")


def gaps(rows: Sequence[Row]) -> list[Row]:
    """For each α, ω and seed: `gap` and `test_gap`, training and test error of the positional student less those of the
    semantic one, and `linear_gap`, the test error of the better one in training less that of the linear baseline."""
    pairs: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["omega"], row["alpha"], row["seed"]), {})[row["init"]] = row
    found = []
    for (omega, alpha, seed), pair in sorted(pairs.items()):
        positional, semantic = pair["positional"], pair["semantic"]
        gap = positional["train_error"] - semantic["train_error"]
        better = positional if gap < 0 else semantic
        found.append(
            {
                "omega": omega,
                "alpha": alpha,
                "seed": seed,
                "gap": gap,
                "test_gap": positional["test_error"] - semantic["test_error"],
                "linear_gap": better["test_error"] - better["linear_test_error"],
                "lean": better["theta"] - better["m"],
            }
        )
    return found


def means(rows: Sequence[Row], column: str, omega: float) -> tuple[list[float], list[float], list[float]]:
    """(α, mean, standard deviation over seeds) of a column of `gaps`; nan is the deviation of one seed."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["omega"] == omega:
            values.setdefault(row["alpha"], []).append(row[column])
    tensors = [torch.tensor(each, dtype=torch.float64) for each in values.values()]
    spread = [float(each.std()) if len(each) > 1 else math.nan for each in tensors]
    return list(values), [float(each.mean()) for each in tensors], spread


def transition(rows: Sequence[Row], column: str, omega: float) -> tuple[float | None, float]:
    """(α where the mean over seeds of a column of `gaps` turns positive, its standard error).

    The error is the standard deviation over resampled seeds; nan where fewer than half of the samples cross.
    """
    sign = -1 if column == "linear_gap" else 1
    mine = [row for row in rows if row["omega"] == omega]
    alphas = sorted({row["alpha"] for row in mine})
    seeds = sorted({row["seed"] for row in mine})
    table = torch.empty(len(alphas), len(seeds), dtype=torch.float64)
    for row in mine:
        table[alphas.index(row["alpha"]), seeds.index(row["seed"])] = sign * row[column]
    chosen = torch.randint(len(seeds), (_RESAMPLES, len(seeds)), generator=generator(0, "transition"))
    found = [crossing(alphas, table[:, each].mean(1).tolist()) for each in chosen]
    known = torch.tensor([each for each in found if each is not None], dtype=torch.float64)
    error = float(known.std()) if len(seeds) > 1 and len(known) > _RESAMPLES / 2 else math.nan
    return crossing(alphas, table.mean(1).tolist()), error


def theory_rows(
    settings: TaskSettings, points: int, folder: Path | None = None, report: Callable[[], object] = lambda: None
) -> list[Row]:
    """Theory at each ω, λ, branch and α, `train_error` divided by d; nan where a branch does not exist.

    Curves that `folder` has are read, others written there; `report` is called for each α of each branch.
    """
    rows = []
    alphas = settings.alpha_values()
    for omega in settings.omega_values():
        for ridge in settings.ridge_values():
            place = folder / f"theory-omega-{omega:g}-ridge-{ridge:g}.csv" if folder else None
            if place is not None and place.exists():
                rows += read_rows(place)
                continue
            theory = Theory(Task(omega, ridge, settings.sigma, settings.matrix_values()), points)
            base = {"omega": omega, "ridge": ridge, "linear_test_error": theory.linear_error()}
            curve = [
                {"alpha": alpha, "init": branch} | _numbers(solution) | base
                for branch in BRANCHES
                for alpha, solution in zip(alphas, follow(theory, branch, alphas, report), strict=True)
            ]
            if place is not None:
                write_csv_atomic(place, curve)
            rows += curve
    return rows


def _numbers(solution: Solution | None) -> Row:
    names = "m", "theta", "norm", "variance", "train_error", "test_error"
    if solution is None:
        return dict.fromkeys(names, math.nan)
    at = solution.overlaps
    # both signs of an overlap are solutions
    numbers = abs(at.m), abs(at.theta), at.norm, at.variance, solution.train_error, solution.test_error
    return dict(zip(names, numbers, strict=True))


def curve(rows: Sequence[Row], column: str, branch: str, omega: float) -> tuple[list[float], list[float]]:
    """(α, values) of a branch in `theory_rows`."""
    mine = sorted(
        (row for row in rows if row["omega"] == omega and row["init"] == branch), key=lambda row: row["alpha"]
    )
    return [row["alpha"] for row in mine], [row[column] for row in mine]


def theory_transitions(rows: Sequence[Row], omega: float) -> tuple[float | None, float | None]:
    """(α_c, α_l) of theory: where training errors cross, and where the semantic test error falls below linear."""
    alphas, semantic = curve(rows, "train_error", "semantic", omega)
    _, positional = curve(rows, "train_error", "positional", omega)
    _, tests = curve(rows, "test_error", "semantic", omega)
    linear = next((row["linear_test_error"] for row in rows if row["omega"] == omega), math.nan)
    gap = [a - b for a, b in zip(positional, semantic, strict=True)]
    return crossing(alphas, gap), crossing(alphas, [linear - test for test in tests])


def comparison(settings: SweepSettings, summaries: Sequence[Mapping]) -> list[Row]:
    """Our means next to the published ones, where a sweep has the same experiments.

    `deviations`: the difference in published standard deviations, which are those of single seeds.
    """
    setup = settings.d, settings.rank, settings.sigma, settings.steps, settings.lr, settings.matrix_values().tolist()
    if setup != (1000, 1, 0.5, 5000, 0.15, [[0.6, 0.4], [0.4, 0.6]]):
        return []
    found = []
    for row in summaries:
        points = POINTS.get(row["init"], {}).get(row["alpha"])
        if points is None or (row["omega"], row["ridge"]) != (0.3, 0.01):
            continue
        for name, (mean, spread) in zip(COLUMNS, points, strict=True):
            found.append(
                {"init": row["init"], "alpha": row["alpha"], "figure": name, "ours": row[name]}
                | {"ours_sd": row[f"{name}_sd"], "published": mean, "published_sd": spread}
                | {"deviations": (row[name] - mean) / spread}
            )
    return found

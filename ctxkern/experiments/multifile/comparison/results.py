"""What the runs of a comparison say: paired differences with intervals, and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.files import write_csv_atomic
from ctxkern.experiments.core.intervals import interval
from ctxkern.experiments.core.tables import aligned
from ctxkern.experiments.multifile.comparison.arms import ARMS, BASE
from ctxkern.experiments.multifile.train import AT


@dataclass
class Summary:
    """Of an arm: means over files and seeds, and its difference from the arm without context.

    `low` and `high` bound the 95 % interval of `delta`; `won` files of `files` have a lower loss, mean over seeds;
    `by_file` are the files' differences; `by_position` the losses of spans of the window, mean over runs.
    """

    arm: str
    loss: float
    delta: float
    low: float
    high: float
    won: int
    files: int
    exact: float
    majority: float
    parameters: int
    step_ms: float
    peak_mib: float
    steps: int
    tuned: Mapping[str, float]
    by_file: Mapping[str, float]
    by_position: Mapping[str, float] = field(default_factory=dict)


def summarise(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]) -> list[Summary]:
    """One `Summary` an arm, by loss; files without validation are left out.

    Args:
        rows: of `Study.run`.
        results: `result.json` of each run by name, for the losses by position.
    """
    found: dict[str, dict[tuple[str, int], Mapping]] = {}
    for row in rows:
        if row["loss"] is not None:
            found.setdefault(row["arm"], {})[row["file"], row["seed"]] = row
    files = list(dict.fromkeys(file for file, _ in found[BASE]))
    seeds = list(dict.fromkeys(seed for _, seed in found[BASE]))

    def losses(arm: str) -> torch.Tensor:
        return torch.tensor([[found[arm][file, seed]["loss"] for seed in seeds] for file in files], dtype=torch.float64)

    summaries = []
    for arm, known in found.items():
        some = list(known.values())
        differences = losses(arm) - losses(BASE)
        low, high = interval(differences)
        by_file = differences.mean(1)
        runs = {row["run"]: row for row in some}
        models = len(files) if ARMS[arm].models != 1 else 1
        summaries.append(
            Summary(
                arm=arm,
                loss=float(losses(arm).mean()),
                delta=float(differences.mean()),
                low=low,
                high=high,
                won=int((by_file < 0).sum()),
                files=len(files),
                exact=_mean([row["exact"] for row in some]),
                majority=_mean([row["majority"] for row in some if row["exact"] is not None]),
                parameters=models * max(row["parameters"] for row in some),
                step_ms=_mean([row["step_ms"] for row in runs.values()]),
                peak_mib=max((row["peak_mib"] or math.nan for row in some), default=math.nan),
                steps=max(row["steps"] for row in some),
                tuned={key[6:]: value for key, value in some[0].items() if key.startswith("tuned_")},
                by_file=dict(zip(files, by_file.tolist(), strict=True)),
                by_position=_positions([results[name]["observed"] for name in runs]),
            )
        )
    return sorted(summaries, key=lambda summary: summary.loss)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _positions(observed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    spans = dict.fromkeys(key for one in observed for key in one if key.startswith(f"{AT}/"))
    return {span.removeprefix(f"{AT}/"): _mean([one.get(span) for one in observed]) for span in spans}


def write(folder: Path, rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary], started: Mapping) -> None:
    """`results.csv`, a row an arm, seed and file; `table.csv`, a row an arm; `positions.csv`, a row an arm and span."""
    write_csv_atomic(folder / "results.csv", [{**row, **started} for row in rows])
    plain = ("arm", "loss", "delta", "low", "high", "won", "files", "exact", "majority", "parameters", "steps")
    write_csv_atomic(
        folder / "table.csv",
        [
            {name: getattr(one, name) for name in (*plain, "step_ms", "peak_mib")} | {"tuned": tuned(one)} | started
            for one in summaries
        ],
    )
    spans = [
        {"arm": one.arm, "positions": span, "loss": loss} for one in summaries for span, loss in one.by_position.items()
    ]
    write_csv_atomic(folder / "positions.csv", spans)


def tuned(summary: Summary) -> str:
    """The values that were chosen for an arm."""
    return " ".join(f"{name}={value:g}" for name, value in summary.tuned.items())


def table(summaries: Sequence[Summary]) -> str:
    """What is printed: a line an arm, the lowest loss first."""
    answers = any(math.isfinite(one.exact) for one in summaries)
    heads = ["arm", "loss", "Δ", "95 %", "won", *(["exact", "majority"] if answers else [])]
    heads += ["parameters", "steps", "ms/step", "MiB", "tuned"]
    lines = []
    for one in summaries:
        base = one.arm == BASE
        cells = [ARMS[one.arm].text, f"{one.loss:.4f}"]
        cells += ["", "", ""] if base else [f"{one.delta:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}"]
        cells += [] if base else [f"{one.won}/{one.files}"]
        cells += [_share(one.exact), _share(one.majority)] if answers else []
        cells += [f"{one.parameters:,}", f"{one.steps:,}", f"{one.step_ms:.1f}", f"{one.peak_mib:.0f}", tuned(one)]
        lines.append(cells)
    return aligned([heads, *lines], left=(0, len(heads) - 1))


def _share(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"

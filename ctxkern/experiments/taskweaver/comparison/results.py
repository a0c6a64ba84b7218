"""What a comparison says: tables, and a picture of differences with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.intervals import interval
from ctxkern.experiments.core.plots import BLUE, FAINT, INK, MUTED, ORANGE, save_figure
from ctxkern.experiments.core.tables import aligned
from ctxkern.experiments.taskweaver.evaluation import ALIGNED


@dataclass
class Summary:
    """Of an arm on a group of datasets: means over datasets and seeds.

    `delta` is the loss minus that of weights of the prompt, paired by dataset and seed, `low` and `high` bound its 95 %
    interval; `worse` datasets of `datasets` have a higher loss than with weights of the prompt, mean over seeds;
    `majority` is the share of examples that the most frequent answer of each dataset is right for; `by_dataset` are the
    differences of datasets.
    """

    group: str
    arm: str
    loss: float
    delta: float
    low: float
    high: float
    worse: int
    datasets: int
    token_accuracy: float
    exact_match: float
    majority: float
    by_dataset: Mapping[str, float]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """One `Summary` a group and arm, in the order of the groups and by loss.

    Args:
        rows: of `Study.evaluate`.
    """
    found: dict[str, dict[str, dict[tuple[str, int], Mapping]]] = {}
    for row in rows:
        arms = found.setdefault(row["group"], {})
        arms.setdefault(row["weights"], {})[row["dataset"], row["seed"]] = row
    summaries = []
    for group, arms in found.items():
        datasets = list(dict.fromkeys(dataset for dataset, _ in arms[ALIGNED]))
        seeds = list(dict.fromkeys(seed for _, seed in arms[ALIGNED]))

        def values(arm: str, key: str, arms: Any = arms, datasets: Any = datasets, seeds: Any = seeds) -> torch.Tensor:
            found = [[arms[arm][dataset, seed][key] for seed in seeds] for dataset in datasets]
            return torch.tensor(found, dtype=torch.float64)

        of_group = []
        for arm in arms:
            differences = values(arm, "loss") - values(ALIGNED, "loss")
            low, high = interval(differences)
            by_dataset = differences.mean(1)
            of_group.append(
                Summary(
                    group,
                    arm,
                    float(values(arm, "loss").mean()),
                    float(differences.mean()),
                    low,
                    high,
                    int((by_dataset > 0).sum()),
                    len(datasets),
                    float(values(arm, "token_accuracy").mean()),
                    float(values(arm, "exact_match").mean()),
                    float(values(arm, "majority").mean()),
                    dict(zip(datasets, by_dataset.tolist(), strict=True)),
                )
            )
        summaries += sorted(of_group, key=lambda one: one.loss)
    return summaries


def table(summaries: Sequence[Summary]) -> str:
    """A table a group."""
    parts = []
    for group in dict.fromkeys(one.group for one in summaries):
        of_group = [one for one in summaries if one.group == group]
        what = f"{group}, {of_group[0].datasets}"
        heads = [what, "loss", "Δ", "95 %", "worse", "token accuracy", "exact match", "majority"]
        lines = [heads]
        for one in of_group:
            own = one.arm == ALIGNED
            lines.append(
                [
                    one.arm,
                    f"{one.loss:.4f}",
                    "" if own else f"{one.delta:+.4f}",
                    "" if own else f"{one.low:+.4f} to {one.high:+.4f}",
                    "" if own else f"{one.worse}/{one.datasets}",
                    f"{one.token_accuracy:.3f}",
                    f"{one.exact_match:.3f}",
                    f"{one.majority:.3f}",
                ]
            )
        parts.append(aligned(lines))
    return "\n\n".join(parts)


def plot(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Each arm's loss minus that with weights of the prompt, a panel a group: a dot with its 95 % interval, a faint dot
    a dataset."""
    groups = list(dict.fromkeys(one.group for one in summaries))
    shown = {group: [one for one in summaries if one.group == group and one.arm != ALIGNED] for group in groups}

    def draw(figure: Any) -> None:
        heights = [len(arms) + 0.6 for arms in shown.values()]
        all_axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, group in zip(all_axes, groups, strict=True):
            axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
            for row, one in enumerate(shown[group]):
                values = list(one.by_dataset.values())
                axes.plot(values, [row] * len(values), "o", color=FAINT, markersize=3, zorder=2)
                colour = ORANGE if one.low > 0 else BLUE if one.high < 0 else MUTED
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2, zorder=3)
                axes.plot([one.delta], [row], "o", color=colour, markersize=6.5, zorder=4)
                axes.annotate(
                    f"{one.delta:+.3f}", (one.delta, row), xytext=(0, 7), textcoords="offset points", ha="center",
                    fontsize=7.5, color=colour,
                )  # fmt: skip
            axes.set_yticks(range(len(shown[group])), [one.arm for one in shown[group]])
            axes.set_ylim(len(shown[group]) - 0.5, -0.8)
            axes.grid(axis="y", visible=False)
            own = next(one for one in summaries if one.group == group and one.arm == ALIGNED)
            axes.set_title(f"{title}: {own.datasets} {group} datasets")
            axes.set_xlabel(f"loss minus that of aligned ({own.loss:.3f}), nats per token: right is worse")

    save_figure(draw, path, (7.6, 1.0 + sum(0.9 + 0.42 * len(arms) for arms in shown.values())))

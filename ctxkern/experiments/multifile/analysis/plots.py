"""The pictures of a report."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxkern.experiments.core.plots import BLUE, FAINT, GRID, INK, MUTED, ORANGE, save_figure, short_name
from ctxkern.experiments.multifile.analysis.analyse import Analysis
from ctxkern.experiments.multifile.analysis.attention import Divergence
from ctxkern.experiments.multifile.analysis.losses import OWN, Swaps
from ctxkern.experiments.multifile.analysis.tables import family_order

# more files than this have no names in pictures
_NAMED = 45
_COLOURS = ("#2563b8", "#d2601a", "#2f8f5b", "#a23b8a", "#8a6d1c", "#1d8a99", "#b3323f", "#5b57b8")


def draw_all(a: Analysis, folder: str | os.PathLike) -> dict[str, Path]:
    """The PNGs that a run has, by name, in `folder`."""
    jobs: dict[str, tuple[bool, Callable[[Any], None], tuple[float, float]]] = {
        "movement": (True, lambda figure: _movement(figure, a), (9, 3.2)),
        "maps": (True, lambda figure: _maps(figure, a), (9, 4.3)),
        "places": (True, lambda figure: _places(figure, a), (9, 4.6)),
        "purity": (bool(a.purities), lambda figure: _purity(figure, a), (9, 2.4)),
        "attention": (a.attention is not None, lambda figure: _attention(figure, a, a.attention), (9, 4.6)),
        "losses": (a.swaps is not None, lambda figure: _losses(figure, a.swaps), (9, 3.2)),
        "ranks": (bool(a.projections), lambda figure: _ranks(figure, a), (9, 2.8)),
    }
    found = {}
    for name, (there, draw, size) in jobs.items():
        if there:
            found[name] = Path(folder, f"{name}.png")
            save_figure(draw, found[name], size)
    return found


def _colours(a: Analysis) -> dict[str, str]:
    """Of families of two or more, as far as there are colours."""
    return dict(zip(a.families.known, _COLOURS, strict=False))


def _movement(figure: Any, a: Analysis) -> None:
    parts = figure.subplots(1, 2 if a.projections else 1, squeeze=False)[0]
    colours = _colours(a)
    order = torch.argsort(a.moved).tolist()
    shades = [colours.get(a.families.names[i], MUTED) for i in order]
    parts[0].scatter(range(len(order)), a.moved[order].tolist(), s=16, color=shades)
    parts[0].set_ylim(bottom=0)
    parts[0].set_xlabel("files, by movement")
    parts[0].set_ylabel("1 − cosine with the start")
    parts[0].set_title("Movement of contexts")
    if a.projections:
        _bars(parts[1], a, [p.change for p in a.projections])
        parts[1].set_title("‖ΔW‖ / ‖W‖, mean over files")


def _bars(axes: Any, a: Analysis, pairs: Sequence[tuple[float, float]]) -> None:
    """By projection: trained and at step 0."""
    for offset, colour, label, index in ((-0.2, BLUE, "trained", 0), (0.2, FAINT, "step 0", 1)):
        places = [number + offset for number in range(len(pairs))]
        axes.bar(places, [pair[index] for pair in pairs], 0.38, color=colour, label=label)
    every = max(1, len(pairs) // 12)
    labels = [p.name.replace("layer ", "") for p in a.projections]
    axes.set_xticks(range(0, len(pairs), every), labels[::every])
    axes.set_xlabel("layer and projection")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2)


def _heat(
    figure: Any,
    axes: Any,
    a: Analysis,
    values: torch.Tensor,
    ids: list[int],
    *,
    names: bool,
    ticks: Any = None,
    **style,
) -> None:
    """A matrix over the files `ids`, in this order, with lines between families."""
    image = axes.imshow(values.numpy(), interpolation="nearest", **style)
    figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=40, ticks=ticks)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    if names and len(ids) <= _NAMED:
        axes.set_yticks(range(len(ids)), [short_name(a.names[i], 30) for i in ids], fontsize=6.5)
        axes.tick_params(length=0)
    else:
        axes.set_yticks([])
    families = [a.families.names[i] if a.families.names[i] in a.families.known else "" for i in ids]
    for place in range(1, len(ids)):
        if families[place] != families[place - 1]:
            axes.axhline(place - 0.5, color=INK, linewidth=0.8)
            axes.axvline(place - 0.5, color=INK, linewidth=0.8)


_SPACES = {"contexts": "contexts", "ΔW": "what they add to the weights, ΔW"}


def _maps(figure: Any, a: Analysis) -> None:
    order = family_order(a)
    axes = figure.subplots(1, len(a.similarity), squeeze=False)[0]
    for number, (space, values) in enumerate(a.similarity.items()):
        style = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "ticks": (-1, -0.5, 0, 0.5, 1)}
        _heat(figure, axes[number], a, values[order][:, order], order, names=number == 0, **style)
        axes[number].set_title(f"Cosines of {space}")


def _places(figure: Any, a: Analysis) -> None:
    colours = _colours(a)
    axes = figure.subplots(1, len(a.places), squeeze=False)[0]
    for number, (space, (places, shares)) in enumerate(a.places.items()):
        here = axes[number]
        shades = [colours.get(name, MUTED if name not in a.families.known else INK) for name in a.families.names]
        here.scatter(*places.T.tolist(), color=shades, s=18)
        _name_points(here, a, places, shades)
        here.set_title(f"{_SPACES[space][0].upper()}{_SPACES[space][1:]}")
        here.set_xlabel(f"first principal axis ({shares[0]:.0%} of the variance)")
        here.set_ylabel(f"second ({shares[1]:.0%})")
        here.margins(0.12)
    for name, colour in colours.items():
        axes[0].scatter([], [], color=colour, s=18, label=short_name(name, 30))
    if colours:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7.5)


def _name_points(axes: Any, a: Analysis, places: torch.Tensor, shades: list[str]) -> None:
    """Names next to points, by family, those left out that would lie on others."""
    spread = (places.max(0).values - places.min(0).values).clamp(min=1e-12)
    named: list[torch.Tensor] = []
    for i in family_order(a):
        # in shares of the axes
        place = places[i] / spread
        if any(abs(place[0] - other[0]) < 0.26 and abs(place[1] - other[1]) < 0.03 for other in named):
            continue
        named.append(place)
        shared = a.families.names[i].removesuffix("*")
        style = {"xytext": (3, 2), "textcoords": "offset points", "fontsize": 6, "color": shades[i]}
        axes.annotate(short_name(a.names[i].removeprefix(shared) or a.names[i], 20), places[i].tolist(), **style)


def _purity(figure: Any, a: Analysis) -> None:
    axes = figure.subplots()
    rows = list(reversed(a.purities))
    for place, p in enumerate(rows):
        for null, offset, colour in ((p.labels, 0.12, FAINT), (p.random, -0.12, MUTED)):
            axes.plot([null.mean, null.high], [place + offset] * 2, color=colour, linewidth=4, solid_capstyle="butt")
        axes.scatter([p.labels.observed], [place], color=ORANGE, zorder=3, s=36)
    axes.plot([], [], color=FAINT, linewidth=4, label="permuted labels, mean to 95 %")
    axes.plot([], [], color=MUTED, linewidth=4, label="random contexts, mean to 95 %")
    axes.scatter([], [], color=ORANGE, s=36, label="this run")
    axes.set_yticks(range(len(rows)), [f"{p.space}, k = {p.k}" for p in rows])
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("share of nearest files that are of the same family")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("Purity of families")


def _attention(figure: Any, a: Analysis, d: Divergence | None) -> None:
    assert d is not None
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    rank = {i: number for number, i in enumerate(family_order(a))}
    rows = sorted(range(len(a.attended)), key=lambda row: rank[a.attended[row]])
    ids = [a.attended[row] for row in rows]
    _heat(figure, left, a, d.pairs[rows][:, rows], ids, names=True, cmap="Blues", vmin=0)
    left.set_title("Divergence of attention (nats), by pair of contexts")
    bars = {"own and\nother": (d.trained, BLUE), "random\nvectors": (d.random, FAINT)}
    if d.families:
        bars |= {"one\nfamily": (d.within, ORANGE), "two\nfamilies": (d.between, "#eebf9f")}
    for place, (height, colour) in enumerate(bars.values()):
        right.bar(place, height, 0.7, color=colour)
        right.annotate(f"{height:.3f}", (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    right.set_xticks(range(len(bars)), list(bars))
    right.grid(axis="x", visible=False)
    right.margins(y=0.15)
    right.set_title("Mean (nats)")


def _losses(figure: Any, swaps: Swaps | None) -> None:
    assert swaps is not None
    axes = figure.subplots()
    kinds = [kind for kind in swaps.kinds if kind != OWN][::-1]
    for place, kind in enumerate(kinds):
        swap = swaps.kinds[kind]
        jitter = torch.linspace(-0.22, 0.22, len(swap.rise))
        axes.scatter(
            swap.rise.tolist(), (place + jitter).tolist(), color=FAINT, s=12, label="a file" if not place else None
        )
        axes.plot([swap.low, swap.high], [place] * 2, color=ORANGE, linewidth=2.5)
        label = "mean over files, 95 % interval" if not place else None
        axes.scatter([swap.mean], [place], color=ORANGE, s=36, zorder=3, label=label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(-0.6, len(kinds) - 0.4)
    axes.set_xlabel("validation loss less that in the own context (nats per label)")
    axes.set_title("Other contexts in place of a file's own")
    axes.legend(loc="best")


def _ranks(figure: Any, a: Analysis) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, pairs in (
        (left, "Effective rank along K", [p.entropy_rank for p in a.projections]),
        (right, "Participation ratio", [p.participation for p in a.projections]),
    ):
        _bars(axes, a, pairs)
        axes.axhline(a.contexts.shape[1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(title)


def draw_runs(names: Sequence[str], figures: Sequence[dict[str, float]], path: str | os.PathLike) -> None:
    """Key figures that should exceed 0, by run."""
    shown = [name for name in figures[0] if "above" in name or "rise" in name]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, name in enumerate(reversed(shown)):
            values = [found[name] for found in figures if name in found]
            axes.plot([min(values), max(values)], [place, place], color=GRID, linewidth=3)
            axes.scatter(values, [place] * len(values), color=BLUE, s=22, zorder=3)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(shown)), list(reversed(shown)), fontsize=7.5)
        axes.set_xscale("symlog", linthresh=0.01)
        ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10]
        low, high = axes.get_xlim()
        ticks = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"Figures of {len(names)} runs (nats, or shares)")

    save_figure(draw, path, (9, 1 + 0.28 * len(shown)))

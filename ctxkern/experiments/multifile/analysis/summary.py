"""What a report says in words, and the figures behind it by name."""

import math

from ctxkern.experiments.multifile.analysis.analyse import Analysis
from ctxkern.experiments.multifile.analysis.losses import OWN
from ctxkern.experiments.multifile.analysis.measures import Null

# p values below this are called a difference
LEVEL = 0.05


def figure(value: float) -> str:
    """A number for people: three decimals, or two digits where these would be 0."""
    if not math.isfinite(value):
        return "–"
    if value and abs(value) < 0.0005:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.3f}".replace("-", "−")


def signed(value: float) -> str:
    """`figure` with its sign."""
    return ("+" if value >= 0 else "") + figure(value)


def probability(p: float) -> str:
    """A p value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def key_figures(a: Analysis) -> dict[str, float]:
    """The numbers that runs are compared by, under names that say what they are; those that the run has."""
    found: dict[str, float] = {"movement of contexts": float(a.moved.mean())}
    if a.projections:
        found["‖ΔW‖ / ‖W‖"] = (sum(p.change[0] ** 2 for p in a.projections) / len(a.projections)) ** 0.5
        found["effective rank"] = sum(p.entropy_rank[0] for p in a.projections) / len(a.projections)
    for p in a.purities:
        found[f"purity, {p.space}, k = {p.k}"] = p.labels.observed
        found[f"purity above its permuted mean, {p.space}, k = {p.k}"] = p.labels.observed - p.labels.mean
        found[f"purity above random contexts, {p.space}, k = {p.k}"] = p.random.observed - p.random.mean
    if a.attention:
        found["divergence, own and other contexts"] = a.attention.trained
        found["divergence above random vectors"] = a.attention.trained - a.attention.random
        found["divergence, own contexts above others on own input"] = a.attention.own.observed - a.attention.own.mean
        if a.attention.families:
            null = a.attention.families
            found["divergence, between less within families, above its permuted mean"] = null.observed - null.mean
    if a.swaps:
        found["validation loss"] = float(a.swaps.kinds[OWN].loss.mean())
        for kind, swap in a.swaps.kinds.items():
            if kind != OWN:
                found[f"rise of the loss, {kind}"] = swap.mean
    return found


def sentences(a: Analysis) -> list[str]:
    """The summary: what contexts do, and whether files can be told apart, with the figures."""
    return [*_losses(a), *_movement(a), *_attention(a), *_purity(a), *_rank(a)]


def _losses(a: Analysis) -> list[str]:
    if not a.swaps:
        return []
    kinds = a.swaps.kinds
    zero, other, nearest = (kinds[kind] for kind in ("zero", "another file's", "the nearest file's"))
    own = figure(float(kinds[OWN].loss.mean()))

    def rise(swap) -> str:
        return f"{signed(swap.mean)} (95 % interval {figure(swap.low)} to {figure(swap.high)})"

    works = [swap for swap in (zero, other) if swap.mean > 0 and swap.p < LEVEL]
    if len(works) == 2:
        verdict = "Contexts do something: files need their own."
    elif works and works[0] is zero:
        verdict = "Contexts do something, but any file's context serves as well as its own."
    elif works:
        verdict = "Contexts do not help: another file's does harm, and none at all is as good as a file's own."
    else:
        verdict = "Contexts do nothing that the validation loss shows."
    text = (
        f"{verdict} In its own context a file's loss is {own} nats per label (mean over {len(a.swaps.files)} files). "
        f"Zero in its place changes it by {rise(zero)}, another file's context by {rise(other)}, the nearest file's by "
        f"{rise(nearest)}."
    )
    return [text]


def _movement(a: Analysis) -> list[str]:
    text = f"Training moved contexts by {figure(float(a.moved.mean()))} (1 − cosine with the start, mean over files)"
    if not a.projections:
        return [f"{text}."]
    now, then = ((sum(p.change[i] ** 2 for p in a.projections) / len(a.projections)) ** 0.5 for i in (0, 1))
    if not now:
        return [f"{text}; what they add to the weights is zero: modulation does nothing."]
    return [f"{text}; what they add to the weights has {figure(now)} of the weights' norm, {figure(then)} at step 0."]


def _verdict(null: Null, yes: str, no: str) -> str:
    return yes if null.p < LEVEL else no


def _attention(a: Analysis) -> list[str]:
    d = a.attention
    if d is None:
        return []
    more = d.p < LEVEL and d.trained > d.random
    words = "further than" if more else "no further than"
    lines = [
        f"On the same input, attention in a file's own context and in another's differs by {figure(d.trained)} nats, "
        f"{words} random vectors of the same norm spread it through the same tensors ({figure(d.random)}; difference "
        f"{signed(d.trained - d.random)}, 95 % interval {figure(d.low)} to {figure(d.high)}, {probability(d.p)})."
    ]
    special = _verdict(d.own, "stands apart from the others", "is not different from the others")
    lines.append(
        f"On a file's own input its context {special}: its divergence from them exceeds theirs among each other by "
        f"{figure(d.own.observed)} nats (contexts dealt at random: 95 % below {figure(d.own.high)}; "
        f"{probability(d.own.p)})."
    )
    if d.families:
        found = _verdict(d.families, "Attention is alike within families", "Attention does not tell families apart")
        lines.append(
            f"{found}: {figure(d.within)} nats between files of one family, {figure(d.between)} between those of two "
            f"(permuted labels: {probability(d.families.p)})."
        )
    return lines


def _purity(a: Analysis) -> list[str]:
    lines = []
    for p in a.purities:
        if p.k != "1":
            continue
        found = "are" if p.labels.p < LEVEL and p.random.p < LEVEL else "are not"
        lines.append(
            f"Families {found} told apart by {p.space}: the nearest file is of the same family for "
            f"{p.labels.observed:.0%} of the files that have relatives; {p.labels.mean:.0%} with permuted labels "
            f"({probability(p.labels.p)}), {p.random.mean:.0%} with random contexts ({probability(p.random.p)}), "
            f"{p.start:.0%} before training."
        )
    return lines


def _rank(a: Analysis) -> list[str]:
    if not a.projections:
        return []
    now, then = (sum(p.entropy_rank[i] for p in a.projections) / len(a.projections) for i in (0, 1))
    width = a.contexts.shape[1]
    return [
        f"The bilinear tensors have an effective rank of {now:.1f} along K = {width} (mean over projections), "
        f"{then:.1f} at step 0."
    ]

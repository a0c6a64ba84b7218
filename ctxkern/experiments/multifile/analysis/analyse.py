"""All numbers of a report of one run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctxkern.experiments.core.data.paths import fingerprint
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.names import one_line, printable
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.multifile.analysis.attention import Divergence, Window, divergence
from ctxkern.experiments.multifile.analysis.families import Families, find_families, read_families
from ctxkern.experiments.multifile.analysis.losses import Swaps, swap_losses
from ctxkern.experiments.multifile.analysis.measures import (
    Neighbours,
    Null,
    against,
    cosines,
    numbered,
    permuted,
    principal_axes,
    spectrum_ranks,
)
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.experiments.multifile.modulation import gram, projections
from ctxkern.experiments.multifile.run import CONFIG, NAMES, Run, source_paths
from ctxkern.experiments.multifile.train import Evaluator, Job, initial_model, majority_shares, prepare

PERMUTATIONS = 1000
_RANDOM_DRAWS = 500
# files whose contexts are compared by their attention, and windows of each
_MOST_CONTEXTS, _ATTENTION_WINDOWS = 40, 2
# neighbours at most
_MOST_NEIGHBOURS = 3


@dataclass
class Purity:
    """k-nearest-neighbour purity of families in one space, see `Neighbours.purity`.

    `labels`: against family labels in random order. `random`: against contexts drawn from N(0, 1), at the norm that
    the model gives them, in place of the learned ones, with the same tensors. `start`: that of the untrained model.
    """

    space: str
    k: str
    labels: Null
    random: Null
    start: float


@dataclass
class Projection:
    """Of one projection, trained and at step 0: ‖ΔW‖ / ‖W‖ (root mean square over files), and the effective ranks of
    the bilinear tensor unfolded along K, [K, D·E]; see `spectrum_ranks`."""

    name: str
    change: tuple[float, float]
    entropy_rank: tuple[float, float]
    participation: tuple[float, float]


@dataclass
class Analysis:
    """The numbers of a run; parts that do not apply are None or empty, and `absent` says why, by part.

    `contexts`, `start` [F, K] are as layers use them, now and at step 0; `similarity` and `places` have, by space, the
    cosines [F, F] and the coordinates on two principal axes with the shares of variance; `moved` [F] is 1 − cosine of
    each context with itself at step 0.
    """

    run: Run
    families: Families
    names: list[str]
    stored: dict
    contexts: Tensor
    start: Tensor
    moved: Tensor
    similarity: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    purities: list[Purity] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    attention: Divergence | None = None
    attention_start: Divergence | None = None
    attended: list[int] = field(default_factory=list)
    swaps: Swaps | None = None
    majority: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


CONTEXT, WEIGHTS = "contexts", "ΔW"


def analyse(
    run: Run,
    *,
    families: Path | None = None,
    windows: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Everything that a report says about a run of `ctxkern train`.

    Args:
        run: of `load_run`. Files of `add-file` are left out: their data is no part of the run.
        families: a CSV file for `read_families`; None: by names, see `find_families`.
        windows: the most validation windows of each file for losses; None: as many as the run evaluated.
        seed: of random draws.
        progress: a bar on a terminal.

    Raises:
        ValueError: a run without contexts, of one file, or a families file that does not fit.
    """
    stored = json.loads((run.path / CONFIG).read_text(encoding="utf-8"))
    names = json.loads((run.path / NAMES).read_text(encoding="utf-8"))
    form = getattr(run.config, "form", "bilinear")
    if form == "none":
        raise ValueError(f"RUN is {printable(run.path)}, whose form is none; it must have contexts")
    if len(names) < 2:
        raise ValueError(f"RUN is {printable(run.path)}, of one file; it must have two or more")
    paths = source_paths(run.path)
    found = read_families(families, names) if families else find_families(names, paths)
    config = run.model.config
    first = initial_model(type(config)(**vars(config) | {"num_files": len(names)}), run.config.seed)
    first = first.to(run.model.token_embeddings.weight).eval()
    with torch.no_grad():
        contexts, start = (model.contexts()[: len(names)].detach() for model in (run.model, first))
        cosine = nn.functional.cosine_similarity(contexts.double(), start.double())
        out = Analysis(run, found, names, stored, contexts, start, 1 - cosine)
        bar = require("tqdm").tqdm(desc="report", unit="part", disable=None if progress else True, leave=False)
        with bar:
            _spaces(out, first, form, seed)
            bar.update()
            job = _data(out, paths)
            if job is not None:
                _losses(out, job, windows, seed, bar.update)
                _attention(out, job, first, seed, bar.update)
    return out


def _whole(model: MultiFileTransformer) -> bool:
    return all(hasattr(block.attention, "bilinear_q") for block in model.blocks)


def _products(model: MultiFileTransformer) -> list[Tensor]:
    return [gram(bilinear).double() for _, bilinear in projections(model)]


def _spaces(out: Analysis, first: MultiFileTransformer, form: str, seed: int) -> None:
    """Movement, maps, purities and ranks."""
    wide, begun = out.contexts.double(), out.start.double()
    one = torch.eye(wide.shape[1], dtype=torch.float64)
    # of each space: the metric, now and at step 0
    metrics = {CONTEXT: (one, one)}
    if _whole(out.run.model):
        now, then = (_products(model) for model in (out.run.model, first))
        metrics[WEIGHTS] = (sum(now, 0 * one), sum(then, 0 * one))
        _projections(out, first, now, then)
    else:
        out.absent["ΔW and ranks"] = f"a run of the form {form} has no bilinear tensors"
    labels = numbered(out.families.names)
    for space, (metric, metric_start) in metrics.items():
        products = wide @ metric @ wide.T
        out.similarity[space] = cosines(products)
        out.places[space] = principal_axes(products)
        if out.families.known:
            out.purities += _purity(out, space, labels, metric, cosines(begun @ metric_start @ begun.T), seed)
    if not out.families.known:
        out.absent["purity"] = f"no families are known: {out.families.rule}"


def _purity(out: Analysis, space: str, labels: Tensor, metric: Tensor, begun: Tensor, seed: int) -> list[Purity]:
    trained, untrained = (Neighbours(matrix, _MOST_NEIGHBOURS) for matrix in (out.similarity[space], begun))
    rng, drawn = generator(seed, "purity", space), []
    # one draw of a run with many files takes long
    for _ in range(_RANDOM_DRAWS if len(labels) <= 500 else 50):
        vectors = torch.randn(out.contexts.shape, generator=rng)
        vectors = out.run.model.scaled(vectors).double()
        drawn.append(Neighbours(cosines(vectors @ metric @ vectors.T), _MOST_NEIGHBOURS))
    found = []
    for k, text in ((1, "1"), (None, "min(3, size − 1)")):

        def statistic(order: Tensor, k: int | None = k) -> float:
            return trained.purity(order, k)

        null = permuted(statistic, labels, PERMUTATIONS, rng)
        random = torch.tensor([neighbours.purity(labels, k) for neighbours in drawn])
        found.append(Purity(space, text, null, against(null.observed, random), untrained.purity(labels, k)))
    return found


def _projections(out: Analysis, first: MultiFileTransformer, now: list[Tensor], then: list[Tensor]) -> None:
    models = ((out.run.model, now, out.contexts.double()), (first, then, out.start.double()))
    rows: list[list] = []
    for model, products, contexts in models:
        part = []
        for (weight, _), metric in zip(projections(model), products, strict=True):
            change = ((contexts @ metric) * contexts).sum(1).mean().sqrt() / weight.double().norm()
            part.append((float(change), *spectrum_ranks(torch.linalg.eigvalsh(metric))))
        rows.append(part)
    for number, values in enumerate(zip(*rows, strict=True)):
        layer, kind = divmod(number, 3)
        out.projections.append(Projection(f"layer {layer + 1} {'qkv'[kind]}", *zip(*values, strict=True)))


def _data(out: Analysis, paths: list[Path]) -> Job | None:
    """The run's validation data, where its files are as they were."""
    lost = [path for path in paths if not path.is_file()]
    changed = [
        path
        for path, entry in zip(paths, out.stored["files"], strict=True)
        if path not in lost and fingerprint(path) != entry["sha256"]
    ]
    if lost or changed:
        what = f"{printable((lost or changed)[0])} {'is gone' if lost else 'has changed'}"
        out.absent["losses and attention"] = f"they need the run's files, and {what}"
        return None
    try:
        settings = vars(out.run.config) | {"device": "cpu", "num_workers": 0}
        job = prepare(type(out.run.config)(**settings), paths)
    except (ValueError, OSError) as error:
        out.absent["losses and attention"] = f"the run's files cannot be read: {one_line(error)}"
        return None
    if not len(job.validation_data):
        out.absent["losses and attention"] = "no file has validation windows"
        return None
    out.majority = majority_shares(job.dataset)
    return job


def _losses(out: Analysis, job: Job, windows: int | None, seed: int, tick: Callable[[], Any]) -> None:
    config = out.run.config
    evaluator = Evaluator(job.validation_data, job.collator, config.batch_size, windows or config.eval_windows)
    rng = generator(seed, "swaps")
    out.swaps = swap_losses(
        out.run.model, config, evaluator.batches, out.contexts, out.similarity[CONTEXT], rng, tick
    )  # fmt: skip


def _attention(out: Analysis, job: Job, first: MultiFileTransformer, seed: int, tick: Callable[[], Any]) -> None:
    by_file: dict[int, list[Tensor]] = {}
    few = Evaluator(job.validation_data, job.collator, out.run.config.batch_size, _ATTENTION_WINDOWS)
    for batch in few.batches:
        for tokens, padding, file_id in zip(batch["input"], batch["padding_mask"], batch["file_id"], strict=True):
            # one token has nothing to choose
            if len(tokens[~padding]) > 1:
                by_file.setdefault(int(file_id), []).append(tokens[~padding])
    sizes = out.families.known
    # those with relatives first, else spread over all
    order = sorted(by_file, key=lambda i: out.families.names[i] not in sizes)
    out.attended = sorted(_spread(order, out.families, _MOST_CONTEXTS))
    if len(out.attended) < 2:
        out.absent["attention"] = "it needs validation windows of two files"
        return
    chosen = torch.tensor(out.attended)
    inputs = [Window(tokens, row) for row, i in enumerate(out.attended) for tokens in by_file[i]]
    labels = numbered([out.families.names[i] for i in out.attended])
    for name, model, contexts in (
        ("attention", out.run.model, out.contexts),
        ("attention_start", first, out.start),
    ):
        rng = generator(seed, "attention")
        setattr(out, name, divergence(model, contexts[chosen], inputs, labels, PERMUTATIONS, rng, tick))


def _spread(order: list[int], families: Families, most: int) -> list[int]:
    """At most so many files: the first of each family with relatives, then the second, and so on; then those alone."""
    seen: dict[str, int] = {}
    ranks = {}
    for i in order:
        name = families.names[i]
        seen[name] = seen.get(name, 0) + 1
        ranks[i] = (name not in families.known, seen[name])
    return sorted(order, key=ranks.__getitem__)[:most]

"""A grid of experiments in parts, each one tensor program; what is done is kept, and a killed sweep goes on."""

import contextlib
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctxkern.experiments.core.checkpoint import load_checkpoint, save_checkpoint
from ctxkern.experiments.core.command import CommandError
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import remove_leftovers, write_csv_atomic, write_json_atomic
from ctxkern.experiments.core.memory import free_bytes
from ctxkern.experiments.core.names import one_line, printable
from ctxkern.experiments.positional.config import SweepSettings
from ctxkern.experiments.positional.data import draw_samples, draw_student, draw_teacher, draw_tests
from ctxkern.experiments.positional.descent import (
    Descent,
    attention,
    errors,
    fit_linear,
    linear_errors,
    make_block,
    make_targets,
)

SETTINGS, PARTS = "sweep.json", "parts"
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Seeds whose experiments are one tensor program, at some α (given by their numbers in the grid)."""

    seeds: tuple[int, ...]
    alphas: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        where = "" if len(self.alphas) > 1 else f"-alpha-{self.alphas[0]}"
        return f"seeds-{self.seeds[0]}-{self.seeds[-1]}{where}"


def make_parts(settings: SweepSettings) -> list[Part]:
    """All parts of the grid, in the order of their seeds."""
    last = settings.seed + settings.seeds
    starts = range(settings.seed, last, settings.seeds_at_once)
    chunks = [tuple(range(start, min(start + settings.seeds_at_once, last))) for start in starts]
    numbers = tuple(range(len(settings.alpha_values())))
    sets = [(number,) for number in numbers] if settings.independent else [numbers]
    return [Part(seeds, alphas) for seeds in chunks for alphas in sets]


@dataclass(frozen=True)
class Column:
    """A student of each α and ω; it does not learn from the part `fold`, −1 for none."""

    ridge: float
    init: str
    fold: int


def _columns(settings: SweepSettings) -> list[Column]:
    folds = range(-1, settings.folds)
    return [Column(*each) for each in itertools.product(settings.ridge_values(), settings.init_values(), folds)]


def _check_memory(settings: SweepSettings, part: Part, samples: int, device: torch.device) -> None:
    # drawn in float32, scaled, and as rows of the blocks
    entry = 4 + 2 * settings.torch_dtype().itemsize
    needed = len(part.seeds) * samples * 2 * settings.d * entry
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"the samples of {len(part.seeds)} seeds take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; "
            "lower seeds_at_once, d or alphas"
        )


class Program:
    """The experiments of a part: `descent` is the state, `rows` what came out."""

    def __init__(self, settings: SweepSettings, part: Part):
        self.settings, self.part = settings, part
        self.device, self.dtype = settings.torch_device(), settings.torch_dtype()
        self.counts = [settings.counts()[number] for number in part.alphas]
        _check_memory(settings, part, self.counts[-1], self.device)
        self.q_star = torch.stack([draw_teacher(seed, settings.d) for seed in part.seeds])
        draws = [
            draw_samples(seed, self.counts[-1], settings.d, settings.sigma, apart=settings.independent)
            for seed in part.seeds
        ]
        self.columns = _columns(settings)
        students = [
            torch.stack([draw_student(seed, column.init, q_star, settings.rank) for column in self.columns])
            for seed, q_star in zip(part.seeds, self.q_star, strict=True)
        ]
        query = torch.stack(students)
        sizes = len(self.counts), len(settings.omega_values())
        query = query[:, None, None].expand(-1, *sizes, -1, -1, -1)
        self._omegas = self._like(torch.tensor(settings.omega_values(), dtype=torch.float64))
        self._matrix = self._like(settings.matrix_values())
        self.descent = Descent(
            self._like(torch.stack(draws)),
            self._like(self.q_star),
            self.counts,
            self._omegas,
            self._matrix,
            self._like(query).contiguous(),
            self._like(torch.tensor([column.ridge for column in self.columns], dtype=torch.float64)),
            settings.lr,
            self._held() if settings.folds else None,
        )

    def _held(self) -> Tensor:
        """[M, n]: sample i is in part i mod folds, so that the first ones of all α divide evenly."""
        part = torch.arange(self.counts[-1], device=self.device) % self.settings.folds
        folds = torch.tensor([column.fold for column in self.columns], device=self.device)
        return part == folds[:, None]

    def _like(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def rows(self) -> list[Row]:
        """A row for each experiment: its place in the grid, errors, overlaps and the linear baseline.

        `train_error` is summed over samples and has λ's part; `test_error` and `held_error` are means. With rank r,
        `m` and `theta` are norms over the columns of Q; `norm` is ‖Q‖² / d.
        """
        settings, descent = self.settings, self.descent
        learnt, held = descent.losses()
        query, stars = descent.query.double(), self._like(self.q_star).double()
        tests, linear = self._test_errors()
        values = {
            "test_error": tests,
            "train_error": learnt + descent.penalty(),
            "train_loss": learnt,
            "m": (query.sum(-1) / settings.d).norm(dim=-1),
            "theta": (torch.einsum("sgwmrd,sd->sgwmr", query, stars) / settings.d).norm(dim=-1),
            "norm": query.square().sum((-2, -1)) / settings.d,
        }
        rows = []
        for s, g, w, m in itertools.product(*map(range, query.shape[:4])):
            column = self.columns[m]
            if column.fold >= 0:
                continue
            row: Row = {
                "alpha": settings.alpha_values()[self.part.alphas[g]],
                "omega": settings.omega_values()[w],
                "ridge": column.ridge,
                "init": column.init,
                "seed": self.part.seeds[s],
                "samples": self.counts[g],
                **{name: float(each[s, g, w, m]) for name, each in values.items()},
                "linear_test_error": float(linear[s, g, w]),
            }
            if settings.folds:
                # the columns after a student are the same student without a part
                row["held_error"] = float(held[s, g, w, m + 1 : m + 1 + settings.folds].sum()) / self.counts[g]
            rows.append(row)
        return rows

    def _test_errors(self) -> tuple[Tensor, Tensor]:
        """Means over the test set: of the students [S, G, W, M], of the linear baselines [S, G, W]."""
        settings, query = self.settings, self.descent.query
        baseline = fit_linear(self.descent.samples(), len(self.counts), settings.linear_ridge)
        total = torch.zeros(query.shape[:4], dtype=torch.float64, device=self.device)
        linear = torch.zeros(query.shape[:3], dtype=torch.float64, device=self.device)
        for x in draw_tests(self.part.seeds, settings.test_samples, settings.d, settings.sigma):
            block = make_block(self._like(x), self._like(self.q_star))
            targets = make_targets(block, self._omegas, self._matrix)
            heads = torch.bmm(query.flatten(1, -2), block.rows.mT).view(*query.shape[:-1], 2, block.samples)
            total += errors(attention(heads), targets).sum(-1, dtype=torch.float64)
            linear += linear_errors(baseline, targets).sum(-1, dtype=torch.float64)
        return total / settings.test_samples, linear / settings.test_samples


class _State(nn.Module):
    """The students of a part, as `save_checkpoint` takes them."""

    def __init__(self, query: Tensor):
        super().__init__()
        self.register_buffer("query", query)


def run_part(settings: SweepSettings, part: Part, folder: Path, report: Callable[[int], object]) -> list[Row]:
    """The rows of a part, from a file, from a checkpoint or from the beginning; `report(steps)` as steps are done."""
    table, state = folder / f"{part.name}.csv", folder / f"{part.name}.safetensors"
    if table.exists():
        report(settings.steps)
        state.unlink(missing_ok=True)
        return read_rows(table)
    config = settings.fixed() | {"part": part.name}
    program = Program(settings, part)
    module, done = _State(program.descent.query), 0
    if state.exists():
        done = load_checkpoint(state, module, config=config).step
        report(done)
    while done < settings.steps:
        program.descent.step()
        done += 1
        report(1)
        if done % settings.checkpoint_every == 0:
            save_checkpoint(state, module, step=done, config=config)
    rows = program.rows()
    if not all(torch.isfinite(torch.tensor([row["train_error"], row["norm"]])).all() for row in rows):
        raise ValueError(f"lr is {settings.lr}; it must be lower: the descent has left the finite numbers")
    write_csv_atomic(table, rows)
    state.unlink(missing_ok=True)
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; all columns but `init` are numbers."""
    whole = ("seed", "samples")
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: v if name == "init" else int(v) if name in whole else float(v or "nan") for name, v in row.items()}
            for row in csv.DictReader(file)
        ]


def begin(folder: Path, settings: SweepSettings, kind: str) -> None:
    """Make the folder, or see that it holds this sweep.

    Raises:
        CommandError: it holds another one.
    """
    place, stored = folder / SETTINGS, {"kind": kind} | settings.fixed()
    if place.exists():
        try:
            there = dict(json.loads(place.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CommandError(f"--run-dir: {printable(place)} is no record of a sweep: {one_line(error)}") from error
        for name, value in stored.items():
            if there.get(name) != value:
                flag = "the command" if name == "kind" else settings.flag(name)
                raise CommandError(
                    f"--run-dir: {printable(folder)} holds a sweep where {flag} is {there.get(name)!r}, not {value!r}; "
                    "name another folder, or give the settings of before"
                )
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    for each in (folder, folder / PARTS):
        remove_leftovers(each)
    write_json_atomic(place, stored | {"all": asdict(settings)})


def run_sweep(settings: SweepSettings, folder: Path, *, kind: str = "sweep", progress: bool = True) -> list[Row]:
    """The rows of all experiments; those of finished parts are read, not computed again.

    Args:
        settings: the grid.
        folder: made where absent.
        kind: what the folder is for; another kind is refused.
        progress: a bar on a terminal, with the time that remains.

    Raises:
        CommandError: the folder holds a sweep with other settings.
        ValueError: the samples do not fit into the memory, or the descent diverged.
    """
    begin(folder, settings, kind)
    parts = make_parts(settings)
    weights = [len(part.seeds) * max(settings.counts()[number] for number in part.alphas) for part in parts]
    rows = []
    with _bar(sum(weights) * max(1, settings.steps), progress) as bar:
        for part, weight in zip(parts, weights, strict=True):
            bar.set_postfix_str(part.name)
            rows += run_part(settings, part, folder / PARTS, lambda steps, weight=weight: bar.update(steps * weight))
    return rows


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    with require("tqdm").tqdm(
        total=total,
        disable=None if progress else True,
        bar_format="{l_bar}{bar}| {elapsed} so far, {remaining} to go, {postfix}",
    ) as bar:
        yield bar


def summarise(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Mean and standard deviation (n − 1) over seeds for each α, ω, λ and initialisation."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["alpha"], row["omega"], row["ridge"], row["init"]), []).append(row)
    found = []
    for (alpha, omega, ridge, init), each in sorted(groups.items()):
        summary = {"alpha": alpha, "omega": omega, "ridge": ridge, "init": init, "seeds": len(each)}
        for name in columns:
            values = torch.tensor([row[name] for row in each], dtype=torch.float64)
            summary[name] = float(values.mean())
            summary[f"{name}_sd"] = float(values.std()) if len(each) > 1 else float("nan")
        found.append(summary)
    return found

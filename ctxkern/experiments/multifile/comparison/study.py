"""The runs of a comparison: tuning of every arm, then its seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxkern.experiments.core.runs import PlannedRun, run_all
from ctxkern.experiments.multifile.comparison.arms import ARMS, RATES
from ctxkern.experiments.multifile.config import TrainConfig

# of the seeds that are reported, far from this one
_TUNING_SEED = 1000


@dataclass
class Study:
    """What is compared, and how.

    Attributes:
        folder: of all runs.
        paths: arguments of `ctxkern train` that name the files.
        names: of the files.
        shared: settings of all arms.
        arms: their names, see `ARMS`.
        width: `d_model` of the wider arm.
        seeds: how many.
        tune_steps: of a run that tunes; 0: the given values are used.
        workers: runs at a time.
    """

    folder: Path
    paths: Sequence[str]
    names: Sequence[str]
    shared: Mapping[str, Any]
    arms: Sequence[str]
    width: int
    seeds: int
    tune_steps: int
    workers: int

    def __post_init__(self) -> None:
        self.config = TrainConfig(**self.shared)
        # what is not tuned stays as it was given
        self.tuned: dict[str, dict[str, Any]] = {
            arm: {knob: values[0] for knob, values in ARMS[arm].knobs.items() if self.tune_steps} for arm in self.arms
        }

    @property
    def steps(self) -> int:
        """Of a run of every arm, but for a model a file at as many steps in all."""
        return self.config.training_steps

    def models(self, arm: str) -> list[str | None]:
        """The file of each of an arm's models, None for all files."""
        return [None] if ARMS[arm].models == 1 else list(self.names)

    def settings(self, arm: str, steps: int, seed: int, only: str | None, **changes: Any) -> dict[str, Any]:
        """Those of a run."""
        chosen = {**self.shared, **ARMS[arm].settings, **changes, "seed": seed}
        if arm == "wider":
            chosen["d_model"] = self.width
        if ARMS[arm].models == "total":
            steps = max(1, round(steps / len(self.names)))
        if only is not None:
            chosen["only"] = only
        return chosen | {"training_steps": steps, "patience": 0}

    def plan(
        self, label: str, arm: str, steps: int, seed: int, **changes: Any
    ) -> Iterator[tuple[PlannedRun, str | None]]:
        """The runs of an arm, each with its file, None for all."""
        for number, only in enumerate(self.models(arm)):
            flags = TrainConfig.arguments(self.settings(arm, steps, seed, only, **changes))
            part = "" if only is None else f"-file{number}"
            # no bar, no comparison of costs: runs share the machine
            arguments = ["train", *self.paths, *flags, "--no-compare-einsum", "--quiet"]
            yield PlannedRun(f"{label}{part}", arguments), only

    def tune(self) -> None:
        """Choose learning rate, then knobs one after another, by the mean loss at a seed that is not reported."""
        if not self.tune_steps:
            return
        rates = {arm: [{"lr": self.config.lr * rate} for rate in RATES] for arm in self.arms}
        self._choose(rates)
        knobs = dict.fromkeys(knob for arm in self.arms for knob in ARMS[arm].knobs)
        for knob in knobs:
            tried = {arm: ARMS[arm].knobs.get(knob, ()) for arm in self.arms}
            self._choose({arm: [{knob: value} for value in values] for arm, values in tried.items() if values})

    def _choose(self, tried: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        seed, runs, groups = self.config.seed + _TUNING_SEED, [], {}
        for arm, values in tried.items():
            for number, value in enumerate(values):
                changes = self.tuned[arm] | value
                # the same settings have one name: what was run for another knob is not run again
                label = "-".join(["tune", arm, *(f"{name}{changes[name]:g}" for name in sorted(changes))])
                planned = [run for run, _ in self.plan(label, arm, self.tune_steps, seed, **changes)]
                groups[arm, number] = [run.name for run in planned]
                runs += planned
        results = run_all(runs, self.folder, workers=self.workers)
        for arm, values in tried.items():
            means = []
            for number in range(len(values)):
                losses = [results[name]["best_loss"] for name in groups[arm, number]]
                means.append(sum(losses) / len(losses))
            self.tuned[arm] |= values[means.index(min(means))]

    def run(self) -> list[dict[str, Any]]:
        """A row of every arm, seed and file: its loss and what its run took."""
        planned, about = [], {}
        for seed in range(self.config.seed, self.config.seed + self.seeds):
            for arm in self.arms:
                for run, only in self.plan(f"{arm}-seed{seed}", arm, self.steps, seed, **self.tuned[arm]):
                    planned.append(run)
                    about[run.name] = {"arm": arm, "seed": seed, "only": only}
        results = run_all(planned, self.folder, workers=self.workers)
        rows = []
        for name, known in about.items():
            result = results[name]
            only = known.pop("only")
            for file in self.names if only is None else [only]:
                rows.append(
                    {
                        **known,
                        "file": file,
                        "loss": result["best"][file],
                        "exact": result["observed"].get(f"exact_match/{file}"),
                        "majority": result["details"]["majority"][file],
                        "best_step": result["best_step"],
                        "steps": result["step"],
                        "parameters": result["details"]["parameters"]["total"],
                        "step_ms": result["step_seconds"] and 1e3 * result["step_seconds"],
                        "peak_mib": result["peak_bytes"] and result["peak_bytes"] / 2**20,
                        "run": name,
                        **{f"tuned_{knob}": value for knob, value in self.tuned[known["arm"]].items()},
                    }
                )
        return rows

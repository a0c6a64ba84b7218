"""One run of a sweep, in a process to itself: trains, or goes on, and measures."""

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from ctxkern.cli import main as ctxkern_main
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.names import path_from_json
from ctxkern.experiments.core.seeding import generator
from ctxkern.experiments.multifile.analysis.families import find_families, read_families
from ctxkern.experiments.multifile.analysis.measures import Neighbours, cosines, numbered, permuted
from ctxkern.experiments.multifile.compare import step_costs
from ctxkern.experiments.multifile.run import CONFIG, Run, load_run
from ctxkern.experiments.multifile.train import prepare

POINT = "point.json"
_PERMUTATIONS = 200
_STEPS = 7


def peak_bytes() -> float:
    """The most memory that this process has held, or nan where the system does not say."""
    try:
        import resource
    except ImportError:
        return float("nan")
    # kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def purity(run: Run, paths: Sequence[Path], families: Path | None) -> tuple[float, float] | None:
    """`Neighbours.purity` of the contexts of a run and its mean under permuted families; None without families."""
    names = run.names
    found = read_families(families, names, partly=True) if families else find_families(names, paths)
    if not found.known or len(found.known) == len(names):
        return None
    contexts = run.model.contexts().detach().double()
    neighbours = Neighbours(cosines(contexts @ contexts.T), 3)
    null = permuted(neighbours.purity, numbered(found.names), _PERMUTATIONS, generator(0, "purity"))
    return null.observed, null.mean


def main(run_dir: Path, families: Path | None, argv: Sequence[str]) -> int:
    """Train by the arguments `argv` of `ctxkern train` in `run_dir`, or go on there, and write what was measured."""
    more = ["--run-dir", str(run_dir), "--quiet", "--no-compare-einsum"]
    status = ctxkern_main(["train", "--resume", *more] if (run_dir / CONFIG).exists() else ["train", *argv, *more])
    if status:
        return status
    peak = peak_bytes()
    run = load_run(run_dir)
    stored = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
    paths = [path_from_json(entry["path"]) for entry in stored["files"]]
    costs = step_costs(prepare(run.config, paths), steps=_STEPS)
    found = purity(run, paths, families)
    write_json_atomic(
        run_dir / POINT,
        {
            "step_ms": {kind: seconds * 1e3 for kind, seconds in costs.seconds.items()},
            "peak_bytes": peak,
            "purity": found[0] if found else None,
            "purity_permuted": found[1] if found else None,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "threads": torch.get_num_threads(),
        },
    )
    return 0


def _end_with_parent() -> None:
    """Ends the process when its standard input closes, as it does when the sweep is killed."""

    def wait() -> None:
        # not by sys.stdin, whose lock the interpreter needs when it ends
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, sys.argv[3:]))

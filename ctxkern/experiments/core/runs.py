"""Sets of runs: many runs of an experiment, one process each, some at a time, and a set that was killed goes on."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from ctxkern.experiments.core.command import CONFIG, EXTRAS, RESULT, CommandError, as_command_errors
from ctxkern.experiments.core.data.paths import fingerprint
from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import remove_leftovers, write_json_atomic
from ctxkern.experiments.core.names import join_names, path_from_json, printable
from ctxkern.experiments.core.plots import require_matplotlib

RUNS = "runs"
PLAN, OUTPUT, LOCK = "runs.json", "output.txt", "lock"
_POLL_SECONDS = 0.1
_TAIL = 6


@dataclass(frozen=True)
class PlannedRun:
    """A run: its `name` is that of its folder, `arguments` those of `ctxkern` without `--run-dir`."""

    name: str
    arguments: Sequence[str]


def read_result(run_dir: Path) -> dict | None:
    """`result.json` of a run that came to its end, or None."""
    try:
        result = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result["interrupted"] is None else None


def add_set_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run_set` reads."""
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the runs and of what they give")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind, of --seed and the next (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; more than 1 disturb times (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_set(plan: Callable[[], Sequence[PlannedRun]], args: argparse.Namespace) -> dict[str, dict]:
    """`run_all` of what `plan` gives in the folder `runs` of --run-dir, as flags say; then remove leftovers there.

    Raises:
        CommandError: a flag or the plan does not fit, or a run failed. MissingExtraError: a package is missing.
        KeyboardInterrupt: as `run_all`.
    """
    for module in EXTRAS:
        require(module)
    require_matplotlib()
    with as_command_errors():
        for flag, count in (("--seeds", args.seeds), ("--workers", args.workers)):
            if count < 1:
                raise CommandError(f"{flag} is {count}; it must be at least 1")
        runs = plan()
        args.run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(args.run_dir)
    try:
        return run_all(runs, args.run_dir / RUNS, workers=args.workers, progress=not args.quiet)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", flush=True)
        raise


def run_all(runs: Sequence[PlannedRun], folder: Path, *, workers: int = 1, progress: bool = True) -> dict[str, dict]:
    """Bring every run to its end, and give `result.json` of each by name.

    Each is `python -m ctxkern ARGUMENTS --run-dir FOLDER/NAME` in a process whose output goes to `output.txt` there.
    The threads of this process are shared among the workers; the last bits of a run depend on their number. Runs that
    came to their end are not run again, one that was stopped or killed is resumed, and one that still runs, since its
    parent alone was killed, is waited for.

    Args:
        runs: what to run, in this order.
        folder: of the set, made where absent; `runs.json` there has the arguments of all runs.
        workers: runs at a time.
        progress: a bar on a terminal.

    Raises:
        CommandError: a run failed, or a run of that name in the folder has other arguments, or has read files that have
            changed since.
        KeyboardInterrupt: SIGINT or SIGTERM; the runs have written a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _record(runs, folder)
    waiting = [run for run in runs if read_result(folder / run.name) is None]
    _check_files([folder / run.name for run in runs if run not in waiting])
    active: list[_Child] = []
    bar = require("tqdm").tqdm(
        total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=None if progress else True
    )
    threads = max(1, torch.get_num_threads() // workers)
    with bar, _interrupt_on_sigterm():
        try:
            while waiting or active:
                while waiting and len(active) < workers:
                    active.append(_Child(waiting.pop(0), folder, threads))
                    bar.set_postfix_str(join_names([child.run.name for child in active]))
                time.sleep(_POLL_SECONDS)
                for child in [child for child in active if child.is_done()]:
                    active.remove(child)
                    child.check()
                    bar.update()
        finally:
            for child in active:
                child.stop()
    results = {run.name: read_result(folder / run.name) for run in runs}
    return {name: result for name, result in results.items() if result is not None}


def _record(runs: Sequence[PlannedRun], folder: Path) -> None:
    plan = {}
    with contextlib.suppress(FileNotFoundError):
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    for run in runs:
        known = plan.setdefault(run.name, list(run.arguments))
        if known != list(run.arguments):
            changed = [pair for pair in zip(known, run.arguments, strict=False) if pair[0] != pair[1]]
            there, here = changed[0] if changed else (len(known), len(run.arguments))
            raise CommandError(
                f"--run-dir: {printable(folder)} holds {run.name!r} with other settings ({there} there, {here} here); "
                "name another folder, or give the settings of before"
            )
    write_json_atomic(folder / PLAN, plan)


def _check_files(run_dirs: Sequence[Path]) -> None:
    """Raise where a file that finished runs have read has changed since; one that is gone cannot tell."""
    now: dict[Path, str] = {}
    for run_dir in run_dirs:
        stored = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
        for entry in stored.get("files", ()):
            path = path_from_json(entry["path"])
            if path not in now:
                now[path] = fingerprint(path) if path.is_file() else ""
            if now[path] not in ("", entry["sha256"]):
                raise CommandError(
                    f"--run-dir: {printable(run_dir)} holds a run on {printable(path)}, which has changed since; name "
                    "another folder"
                )


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Child:
    """A run's process. It holds a lock of the run's folder as long as it lives, with or without its parent."""

    run: PlannedRun
    folder: Path
    threads: int
    process: subprocess.Popen | None = None
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.place = self.folder / self.run.name
        self._start()

    def _start(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        with (self.place / LOCK).open("w") as lock:
            if not _lock(lock):
                return
            resume = ["--resume"] if (self.place / CONFIG).exists() else []
            command = [sys.executable, "-m", "ctxkern", *self.run.arguments, *resume, "--run-dir", str(self.place)]
            with (self.place / OUTPUT).open("ab") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                    pass_fds=(lock.fileno(),),
                    # Ctrl-C is passed on once, by `stop`
                    start_new_session=True,
                )

    def is_done(self) -> bool:
        if self.process is None and read_result(self.place) is None:
            self._start()
            return False
        return self.process is None or self.process.poll() is not None

    def check(self) -> None:
        if read_result(self.place) is None:
            text = (self.place / OUTPUT).read_text(encoding="utf-8", errors="replace")
            tail = "\n".join(text.splitlines()[-_TAIL:])
            raise CommandError(f"the run {self.run.name!r} failed; {printable(self.place / OUTPUT)} ends:\n{tail}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()


def _lock(file: IO) -> bool:
    """Whether the lock was free; it is held until the last process that inherited the file ends."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

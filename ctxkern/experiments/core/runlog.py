"""What a run leaves behind as it goes: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from ctxkern.experiments.core.extras import require
from ctxkern.experiments.core.files import write_text_atomic
from ctxkern.experiments.core.names import printable, utf8_alias

METRICS, LOGS = "metrics.jsonl", "logs"


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of `metrics.jsonl`, up to a line that a kill cut off."""
    path = Path(run_dir) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class RunLog:
    """Both logs, cut back to `start_step` so that a resumed run leaves no row twice.

    Args:
        run_dir: existing folder.
        start_step: steps completed; rows of later steps are dropped, at 0 all rows.
        board: folder of TensorBoard's events; None: `logs` in the run folder.
        write: False where another process writes; `rows` are kept all the same.
    """

    def __init__(self, run_dir: Path, start_step: int, *, board: Path | None = None, write: bool = True):
        self.rows = [row for row in read_metrics(run_dir) if row["step"] <= start_step] if start_step else []
        self._writes = write
        if not write:
            return
        write_text_atomic(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = (run_dir / METRICS).open("a", encoding="utf-8", newline="\n")
        writer = require("torch.utils.tensorboard").SummaryWriter
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(utf8_alias(run_dir))
            self._board = writer(str(board or folder / LOGS), purge_step=start_step + 1 if start_step else 0)
            self._alias = stack.pop_all()

    def write(self, row: dict, scalars: Mapping[str, float]) -> None:
        """Append `row` (with its `step`) to the file and `scalars` to TensorBoard."""
        self.rows.append(row)
        if not self._writes:
            return
        self._file.write(json.dumps(row) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(printable(name), value, row["step"])

    def flush(self) -> None:
        """Hand both logs' rows to the operating system."""
        if self._writes:
            self._file.flush()
            self._board.flush()

    def close(self) -> None:
        """Flush and close both logs."""
        if self._writes:
            self._file.close()
            self._board.close()
            self._alias.close()

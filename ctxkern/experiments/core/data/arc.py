"""ARC tasks: pairs of grids, alone or many in one file."""

from collections.abc import Mapping
from typing import TypeGuard

from ctxkern.experiments.core.data.records import grid_to_text, is_grid

_GRID = "a grid: rows of equal length of the integers 0 to 9"


def is_arc(value: object) -> TypeGuard[Mapping]:
    """Whether `value` is an object with a list `train` (and `test`) of pairs whose input is a list of lists."""
    if not isinstance(value, Mapping) or not isinstance(value.get("train"), list):
        return False
    pairs = [*value["train"], *(value.get("test") or ())]
    return bool(pairs) and all(
        isinstance(pair, Mapping)
        and isinstance(pair.get("input"), list)
        and all(isinstance(row, list) for row in pair["input"])
        for pair in pairs
    )


def arc_tasks(value: object) -> dict[str, Mapping] | None:
    """The tasks of a JSON value by a prefix for messages: one task, a list of tasks, or an object of tasks by name."""
    if is_arc(value):
        return {"": value}
    if isinstance(value, list):
        named = {f"task {i}, ": task for i, task in enumerate(value, 1)}
    elif isinstance(value, Mapping):
        named = {f"task {name}, ": task for name, task in value.items()}
    else:
        return None
    return named if named and all(map(is_arc, named.values())) else None


def arc_items(tasks: Mapping[str, Mapping]) -> tuple[list[dict], list[str]]:
    """The items of `tasks`, test pairs in the split `"validation"`, and notes on what is left out or shared.

    Raises:
        ValueError: a grid that is none; the message names the task and the pair.
    """
    items, without_output = [], 0
    for prefix, task in tasks.items():
        for key, split in (("train", "train"), ("test", "validation")):
            for i, pair in enumerate(task.get(key) or ()):
                # the test outputs of a held-back set are absent
                if split == "validation" and pair.get("output") is None:
                    without_output += 1
                    continue
                for side in ("input", "output"):
                    if not is_grid(pair.get(side)):
                        raise ValueError(f"{prefix}{key}[{i}]: its {side} must be {_GRID}")
                items.append(
                    {"input": grid_to_text(pair["input"]), "target": grid_to_text(pair["output"]), "split": split}
                )
    notes = []
    if without_output:
        notes.append(f"{without_output} test pairs without an output are left out")
    if len(tasks) > 1:
        notes.append(f"its {len(tasks)} ARC tasks share one context; a file per task gives each its own")
    return items, notes

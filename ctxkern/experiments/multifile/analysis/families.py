"""Which files belong together: as the user says, or by their names."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctxkern.experiments.core.names import join_names, printable
from ctxkern.experiments.multifile.analysis.measures import groups


@dataclass
class Families:
    """The family of each file, by file id, and where they are from. A file in none is a family by its own name."""

    names: list[str]
    rule: str

    @property
    def known(self) -> dict[str, int]:
        """Those of two or more files, with their sizes."""
        return groups(self.names)

    def describe(self) -> str:
        """One line: the families and how they were found."""
        if not self.known:
            return f"none: {self.rule}"
        alone = len(self.names) - sum(self.known.values())
        rest = f"; {alone} files alone" if alone else ""
        return f"{join_names([f'{name} ({size})' for name, size in self.known.items()], 12)}{rest}; by {self.rule}"


def find_families(names: Sequence[str], paths: Sequence[Path]) -> Families:
    """Families by names, the first of these rules that finds two files together and two apart:

    1. variants of `--augment` (`NAME#1`) are with their file;
    2. files in several folders: the folder;
    3. the words of the names, divided by `_`, `-`, `.` and blanks, without the suffix: files that share the first word,
       or where all share it the next, and so on (`logical_deduction_five_objects` and `logical_deduction_seven_objects`
       are `logical_deduction_*`);
    4. the suffix.

    Args:
        names: of the files, by file id, those of variants last.
        paths: of the files that are no variants.
    """
    sources = [*range(len(paths)), *(names.index(name.rpartition("#")[0]) for name in names[len(paths) :])]
    folders = _folders([paths[i].parent for i in sources])
    rules = {
        "the file that a variant is of": [names[i] for i in sources] if len(names) > len(paths) else [],
        "folder": folders,
        "the first words of the names": _by_words(names),
        "suffix": [paths[i].suffix.lower() or paths[i].name for i in sources],
    }
    for rule, families in rules.items():
        if groups(families) and len(set(families)) > 1:
            return Families(families, rule)
    return Families(list(names), "nothing in the names tells files apart; --families FILE.csv does")


def _folders(parents: list[Path]) -> list[str]:
    """The part of each folder below the folder that all share."""
    shared = Path(os.path.commonpath(parents))
    return [printable(parent.relative_to(shared)) for parent in parents]


def _by_words(names: Sequence[str]) -> list[str]:
    words = [re.split(r"[_.\s-]+", Path(name).stem) for name in names]
    # words that all begin with say nothing
    start = len(os.path.commonprefix(words))
    counts = Counter(entry[start] for entry in words if len(entry) > start)
    families = list(names)
    for first in (word for word, count in counts.items() if count > 1):
        members = [i for i, entry in enumerate(words) if len(entry) > start and entry[start] == first]
        shared = os.path.commonprefix([names[i] for i in members])
        # whole words
        label = shared if shared in names else re.sub(r"[^_.\s-]*$", "", shared) or first
        for i in members:
            families[i] = f"{label}*"
    return families


def read_families(path: str | os.PathLike, names: Sequence[str], *, partly: bool = False) -> Families:
    """Families from a CSV file with the columns `name` and `family`; files that it leaves out are in none.

    Args:
        path: the CSV file.
        names: of the files.
        partly: whether it may have names of other files.

    Raises:
        ValueError: other columns; a name that is of no file, or comes twice.
    """
    where = printable(path)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        if not {"name", "family"} <= set(columns):
            raise ValueError(f"--families: {where} has the columns {', '.join(columns)}; it must have name and family")
        families, seen = list(names), set()
        for row in rows:
            name = row["name"] or ""
            if name not in names and partly:
                continue
            if name not in names:
                raise ValueError(f"--families: {where} has the name {name!r}; it must be one of {join_names(names)}")
            if name in seen:
                raise ValueError(f"--families: {where} has {name!r} twice; it must have each name once")
            seen.add(name)
            families[names.index(name)] = row["family"] or name
    return Families(families, where)

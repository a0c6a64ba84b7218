"""Which adapter has which place in the bank, and how far each is. It is part of every checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TRAINING, FINISHED, FAILED, RETIRED = "training", "finished", "failed", "retired"


@dataclass
class Member:
    """An adapter.

    Attributes:
        name: of the adapter.
        path: the file or folder that it trains on.
        slot: its row in the bank; None once retired.
        lr: its learning rate.
        steps: to train to, by its own count; None: as long as the run.
        done: its own steps.
        files: SHA-256 of its files by path.
        state: training, finished, failed (its loss or gradient was not finite) or retired.
    """

    name: str
    path: str
    slot: int | None
    lr: float
    steps: int | None
    done: int = 0
    files: dict[str, str] = field(default_factory=dict)
    state: str = TRAINING

    @property
    def row(self) -> int:
        """`slot` of one that has one.

        Raises:
            ValueError: it is retired.
        """
        if self.slot is None:
            raise ValueError(f"adapter {self.name!r} is retired; it has no row")
        return self.slot


class Roster:
    """The members of a bank with `slots` rows; `applied` is the number of the last request that it has seen."""

    def __init__(self, slots: int):
        self.slots, self.applied = slots, 0
        self.members: dict[str, Member] = {}

    def add(self, name: str, path: Path, lr: float, steps: int | None) -> Member:
        """A new member in the first free row.

        Raises:
            ValueError: the name is taken or is no name of a folder, or no row is free.
        """
        if name in ("", ".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
            raise ValueError(f"name is {name!r}; it must be one that a folder can have")
        if name in self.members:
            state = "one that is retired" if self.members[name].slot is None else "an adapter"
            raise ValueError(f"name is {name!r}; it must be a new one: the run has {state} of this name")
        taken = {member.slot for member in self.members.values()}
        free = [slot for slot in range(self.slots) if slot not in taken]
        if not free:
            raise ValueError(f"no row of the bank is free for {name!r}: slots is {self.slots}; retire an adapter first")
        self.members[name] = Member(name, str(path), free[0], lr, steps)
        return self.members[name]

    def find(self, name: str) -> Member:
        """The member of a name that has a row.

        Raises:
            ValueError: there is none.
        """
        member = self.members.get(name)
        if member is None or member.slot is None:
            known = ", ".join(other.name for other in self.present()) or "none"
            raise ValueError(f"name is {name!r}; it must be an adapter of the run: {known}")
        return member

    def present(self) -> Iterator[Member]:
        """The members that have a row."""
        return (member for member in self.members.values() if member.slot is not None)

    def next_to_train(self, most: int | None) -> list[Member]:
        """Those of the next step: of the ones in training the `most` with the fewest steps, in the order of rows."""
        training = sorted(
            (member for member in self.present() if member.state == TRAINING), key=lambda m: (m.done, m.row)
        )
        return sorted(training[:most], key=lambda m: m.row)

    def to_json(self) -> dict[str, Any]:
        """What `update` reads."""
        return {"slots": self.slots, "applied": self.applied, "members": [asdict(m) for m in self.members.values()]}

    def update(self, stored: Mapping[str, Any]) -> None:
        """Become what `to_json` gave."""
        self.slots, self.applied = stored["slots"], stored["applied"]
        self.members = {entry["name"]: Member(**entry) for entry in stored["members"]}

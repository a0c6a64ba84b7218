"""A bank of adapters trained in mixed batches, each as it would train alone."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ctxkern
from ctxkern.experiments.adapters import requests
from ctxkern.experiments.adapters.bank import AdapterBank, attention_targets
from ctxkern.experiments.adapters.config import AdapterSettings
from ctxkern.experiments.adapters.data import AdapterData, collate, discover
from ctxkern.experiments.adapters.roster import FAILED, FINISHED, RETIRED, TRAINING, Member, Roster
from ctxkern.experiments.core import processes
from ctxkern.experiments.core.batches import Batch
from ctxkern.experiments.core.data.windows import IGNORE_INDEX, Collator
from ctxkern.experiments.core.files import write_json_atomic
from ctxkern.experiments.core.hub import load_language_model
from ctxkern.experiments.core.loop import Next
from ctxkern.experiments.core.names import one_line, printable
from ctxkern.experiments.core.schedule import warmup_cosine

ROSTER, EXPORTED = "adapters.json", "adapters"
_SPARE = 8
# steps between looks for requests
_LOOK = 10


class AdapterJob:
    """What `ctxkern adapters train` trains.

    Args:
        config: the settings.
        resumed: the folder of a run that goes on: its adapters are those of the run, not those of `config.data`.

    Raises:
        ValueError, OSError: settings, a model or data that do not fit.
    """

    steers = True

    def __init__(self, config: AdapterSettings, resumed: Path | None = None):
        roster = _first_roster(config) if resumed is None else _roster_of(resumed)
        self.config = replace(config, slots=roster.slots)
        lm, self.tokenizer = load_language_model(config.model, config.torch_device(), getattr(torch, config.dtype))
        if config.checkpointing:
            lm.gradient_checkpointing_enable()
        targets = attention_targets(lm) if config.targets == "auto" else [t.strip() for t in config.targets.split(",")]
        self.model = AdapterBank(lm, roster, config.rank, config.alpha, targets)
        self.optimizer = ctxkern.AdapterAdamW(
            self.model.banks(), lr=1.0, weight_decay=config.weight_decay, grad_clip=config.grad_clip or None
        )
        self.collator = Collator(self.tokenizer, config.seq_len, longest=True)  # type: ignore[arg-type]
        self.data: dict[str, AdapterData] = {}
        self.run_dir: Path | None = None
        self.looked = False
        self.losses: dict[str, float] = {}
        for member in roster.present():
            self.model.begin(member.row, member.name, config.seed)
            self._read(member)

    @property
    def roster(self) -> Roster:
        """Who is in the bank."""
        return self.model.roster

    def _read(self, member: Member) -> AdapterData:
        if member.name not in self.data:
            c = self.config
            self.data[member.name] = AdapterData(
                member, self.tokenizer, seq_len=c.seq_len, val_fraction=c.val_fraction, rows=c.rows, seed=c.seed
            )
        data = self.data[member.name]
        # a checkpoint that was read since has the files of its time
        if member.files and member.files != data.files:
            raise ValueError(f"adapter {member.name!r}: {printable(member.path)} has changed since the run began")
        member.files = data.files
        return data

    def batches(self) -> Callable[[int], Batch]:
        """The mixed batch of a step: the next rows of each adapter whose turn it is."""

        def batch_at(step: int) -> Batch:
            items, slots = [], []
            for member in self._turns():
                rows = self._read(member).rows_at(member.done)
                items += rows
                slots += [member.row] * len(rows)
                member.done += 1
                if member.done == member.steps:
                    member.state = FINISHED
            return collate(self.collator, items, slots)

        return batch_at

    def _turns(self) -> list[Member]:
        return self.roster.next_to_train(self.config.adapters_per_step)

    def weigh(self, batch: Batch) -> float:
        """Losses of parts of a batch add up: each row has its weight."""
        return 1.0

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The mean over adapters of the mean over labels."""
        losses = self.model.finite(self.model.losses(model, batch), batch["adapter"])
        return (losses * batch["weight"].to(losses)).sum()

    def before_step(self, step: int) -> Next:
        """Take up requests, and set the learning rate of each adapter."""
        changed = False
        if not self.looked or step % _LOOK == 0:
            self._leave_out_failed(step)
            changed = self._take_up_requests()
        self.looked = True
        turns = self._turns()
        if not turns:
            return Next.STOP
        scales = torch.zeros(self.roster.slots, dtype=torch.float64)
        for member in turns:
            scales[member.row] = member.lr * self._schedule(member)
        self.optimizer.lr_scales = scales
        self.optimizer.averaged = len(turns)
        return Next.SAVE if changed else Next.STEP

    def _leave_out_failed(self, step: int) -> None:
        """Those whose loss or gradient was not finite train no more; the others never saw them."""
        failed = self.model.failed
        if processes.count() > 1:
            failed = processes.accelerator(failed.device).reduce(failed.int(), "sum") > 0
        for member in [member for member in self.roster.present() if member.state == TRAINING]:
            if failed[member.row]:
                member.state = FAILED
                if processes.is_main():
                    print(
                        f"adapter {member.name!r} has failed by step {step}: its loss or gradient is not finite; the "
                        "others go on",
                        flush=True,
                    )
        self.model.failed.zero_()

    def _schedule(self, member: Member) -> float:
        config = self.config
        if config.schedule == "constant":
            return min(1.0, (member.done + 1) / max(1, config.warmup_steps))
        return warmup_cosine(member.done, member.steps or config.training_steps, config.warmup_steps)

    def evaluator(self) -> Callable[[AdapterBank], Mapping[str, float]]:
        """The mean loss over labels of each adapter's validation examples."""

        def evaluate(model: AdapterBank) -> dict[str, float]:
            self.losses = {member.name: self._evaluate(model, member) for member in self.roster.present()}
            self.write_roster()
            return self.losses

        return evaluate

    def _evaluate(self, model: AdapterBank, member: Member) -> float:
        data, device = self._read(member).validation, self.model.lm.device
        count = min(self.config.eval_windows, len(data))
        chosen = [data[i * len(data) // count] for i in range(count)]
        loss, labels, size = 0.0, 0, max(1, self.config.rows) * 4
        for start in range(0, count, size):
            items = chosen[start : start + size]
            batch = collate(self.collator, items, [member.row] * len(items))
            batch = {name: value.to(device) for name, value in batch.items()}
            loss += float(model.losses(model, batch).sum())
            labels += int((batch["target"] != IGNORE_INDEX).sum())
        return loss / labels if labels else math.nan

    def _take_up_requests(self) -> bool:
        """Whether any was there."""
        if self.run_dir is None:
            return False
        found = processes.from_main(requests.waiting(self.run_dir, self.roster.applied))
        for number, request in found:
            try:
                what = self._apply(request)
            except (ValueError, OSError) as error:
                what = {"refused": one_line(error)}
            self.roster.applied = number
            if processes.is_main():
                requests.answer(self.run_dir, number, **what)
        if found:
            self.write_roster()
        return bool(found)

    def _apply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["do"] == "retire":
            member = self.roster.find(request["name"])
            where = self.export(member)
            slot, member.slot, member.state = member.slot, None, RETIRED
            self.data.pop(member.name, None)
            return {"retired": member.name, "row": slot, "exported": str(where)}
        lr = self.config.lr if request["lr"] is None else request["lr"]
        steps = self.config.adapter_steps if request["steps"] is None else request["steps"]
        member = self.roster.add(request["name"], Path(request["path"]), lr, steps)
        try:
            self._read(member)
        except (ValueError, OSError):
            del self.roster.members[member.name]
            raise
        self.model.begin(member.row, member.name, self.config.seed)
        self.optimizer.reset(member.row)
        return {"added": member.name, "row": member.slot}

    def export(self, member: Member) -> Path:
        """PEFT's files of an adapter, in the run folder."""
        where = (self.run_dir or Path()) / EXPORTED / member.name
        # of a sharded bank all bring their parts
        if processes.is_main() or processes.is_sharded(self.model):
            ctxkern.export_adapter(self.model.lm, member.row, where)
        return where

    def write_roster(self) -> None:
        """For people: who is in the bank, how far, and the last validation losses."""
        if self.run_dir is not None and processes.is_main():
            values = self.roster.to_json()
            for entry in values["members"]:
                loss = self.losses.get(entry["name"], math.nan)
                entry["validation"] = loss if math.isfinite(loss) else None
            write_json_atomic(self.run_dir / ROSTER, values)


def _first_roster(config: AdapterSettings) -> Roster:
    found = discover(config.data)
    roster = Roster(len(found) + _SPARE if config.slots is None else config.slots)
    for name, (path, given) in found.items():
        roster.add(name, path, given.get("lr", config.lr), given.get("steps", config.adapter_steps))
    return roster


def _roster_of(run_dir: Path) -> Roster:
    stored = json.loads((run_dir / ROSTER).read_text(encoding="utf-8"))
    for entry in stored["members"]:
        del entry["validation"]
    roster = Roster(stored["slots"])
    roster.update(stored)
    return roster

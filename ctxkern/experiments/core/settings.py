"""Settings of a run, each written once: the field of a dataclass is also its check, its flag and its help.

    @dataclass(kw_only=True)
    class MySettings(RunSettings):
        width: int = setting(64, "width of the model", at_least=1, group="model")

gives the attribute `width`, the error "width is 0; it must be an integer of at least 1", the flag `--width` with its
default in the help, and, as it is not `resumable`, a resumed run that refuses another width.
"""

import argparse
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from ctxkern.experiments.core.processes import local_device

AnySettings = TypeVar("AnySettings", bound="Settings")
_KEY = "setting"
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Rule:
    """What `setting` says about a field; `kind` and `optional` come from its annotation."""

    help: str
    group: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    flags: tuple[str, ...] = ()
    default: str = ""
    resumable: bool = False
    is_path: bool | None = False
    kind: type = str
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether the setting may have `value`."""
        if value is None:
            return self.optional
        if self.kind in (int, float):
            kind = numbers.Integral if self.kind is int else numbers.Real
            if (
                isinstance(value, bool)
                or not isinstance(value, kind)
                or value in (math.inf, -math.inf)
                or value != value
            ):
                return False
        elif not isinstance(value, self.kind):
            return False
        return (
            (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def keep(self, value: Any) -> Any:
        """An accepted value as settings have it."""
        is_path = os.path.exists(value) if self.is_path is None and value else self.is_path
        return os.path.abspath(value) if is_path and value else self.kind(value)

    def takes(self) -> str:
        """What it accepts, to follow "it must be"."""
        if self.choices:
            text = f"one of {', '.join(self.choices)}"
        else:
            limits = (("of at least", self.at_least), ("above", self.above), ("below", self.below))
            given = [f"{word} {limit}" for word, limit in limits if limit is not None]
            text = " ".join([_KINDS[self.kind], " and ".join(given)]).strip()
        return f"{text}, or None" if self.optional else text


def setting(
    default: Any,
    help: str,
    *,
    group: str = "run",
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flags: tuple[str, ...] = (),
    default_text: str = "",
    resumable: bool = False,
    is_path: bool | None = False,
) -> Any:
    """A field of a `Settings` class.

    Args:
        default: the value where none is given; its annotation is `int`, `float`, `str` or `bool`, `| None` where None
            has a meaning.
        help: a few words for `--help`, without the default.
        group: the heading in `--help`.
        choices: the only values.
        at_least, above, below: bounds of a number.
        flags: in place of `--name-with-dashes`.
        default_text: what the help says of a default that is None.
        resumable: whether a resumed run may have another value.
        is_path: a path, kept absolute, as a run may be resumed in another folder; None: if there is something there.
    """
    rule = Rule(help, group, tuple(choices), at_least, above, below, tuple(flags), default_text, resumable, is_path)
    return dataclasses.field(default=default, metadata={_KEY: rule})


@dataclass(kw_only=True)
class Settings:
    """Base of settings; every field of a subclass that `setting` made is checked when an object is made.

    Raises:
        ValueError: a value that a field does not accept.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        for name, rule in self.rules().items():
            value = getattr(self, name)
            if not rule.accepts(value):
                raise ValueError(f"{name} is {value!r}; it must be {rule.takes()}")
            if value is not None:
                setattr(self, name, rule.keep(value))

    @classmethod
    @functools.cache
    def rules(cls) -> dict[str, Rule]:
        """The rule of each setting by name."""
        hints, rules = typing.get_type_hints(cls), {}
        for field in dataclasses.fields(cls):
            if _KEY in field.metadata:
                parts = typing.get_args(hints[field.name]) or (hints[field.name],)
                optional = type(None) in parts
                (kind,) = (part for part in parts if part is not types.NoneType)
                rules[field.name] = dataclasses.replace(field.metadata[_KEY], kind=kind, optional=optional)
        return rules

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return list(cls.rules())

    @classmethod
    def preset(cls: type[AnySettings], name: str, **changes: Any) -> AnySettings:
        """The settings of the preset `name` with `changes`.

        Raises:
            ValueError: no preset of that name.
        """
        return cls(**cls.preset_values(name) | changes)

    @classmethod
    def preset_values(cls, name: str) -> dict[str, Any]:
        """What the preset `name` sets.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in cls.presets:
            raise ValueError(
                f"preset is {name!r}; it must be one of {', '.join(cls.presets) or 'none: there are none'}"
            )
        return dict(cls.presets[name])

    def fixed(self) -> dict[str, Any]:
        """The settings that all parts of a resumed run must share."""
        return {name: getattr(self, name) for name, rule in self.rules().items() if not rule.resumable}

    @classmethod
    def flag(cls, name: str) -> str:
        """The first flag of the setting `name`."""
        return (*cls.rules()[name].flags, "--" + name.replace("_", "-"))[0]

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each setting, under the heading of its group. A flag not given leaves no attribute."""
        groups: dict[str, Any] = {}
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, rule in cls.rules().items():
            if rule.group not in groups:
                groups[rule.group] = parser.add_argument_group(rule.group)
            default = rule.default or defaults[name]
            # argparse formats the help with %
            text = f"{rule.help} (default: {default})".replace("%", "%%")
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if rule.kind is bool:
                text = f"{rule.help} (default: {'yes' if default else 'no'})".replace("%", "%%")
            else:
                metavar = "{" + ",".join(rule.choices) + "}" if rule.choices else rule.kind.__name__.upper()
                options = {"type": rule.kind, "metavar": metavar}
            flags = rule.flags or (cls.flag(name),)
            groups[rule.group].add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **options)

    @classmethod
    def arguments(cls, values: Mapping[str, Any]) -> list[str]:
        """The flags that give `values` by name; None is the lack of its flag."""
        found = []
        for name, value in values.items():
            flag = cls.flag(name)
            if cls.rules()[name].kind is bool:
                found.append(flag if value else flag.replace("--", "--no-", 1))
            elif value is not None:
                # one word: a value may begin with a dash
                found.append(f"{flag}={value}")
        return found

    @classmethod
    def given(cls, args: argparse.Namespace) -> dict[str, Any]:
        """The settings whose flags were given, by name, paths absolute."""
        found = {name: getattr(args, name) for name in cls.names() if hasattr(args, name)}
        rules = cls.rules()
        return {
            name: value if rules[name].is_path is False else rules[name].keep(value) for name, value in found.items()
        }


@dataclass(kw_only=True)
class RunSettings(Settings):
    """The settings that the training loop itself reads; those of an experiment extend them."""

    training_steps: int = setting(
        400, "training steps", at_least=1, flags=("--steps", "--training-steps"), resumable=True
    )
    device: str = setting("auto", "cpu, cuda, ...; auto is a GPU where there is one", resumable=True)
    seed: int = setting(0, "seed of everything random")
    log_every: int = setting(10, "steps between writes of the logs", at_least=1, resumable=True)
    tensorboard_dir: str | None = setting(
        None, "folder of TensorBoard's events", default_text="logs in the run folder", resumable=True, is_path=True
    )
    eval_every: int | None = setting(
        None, "steps between validations", at_least=1, default_text="a tenth of the run", resumable=True
    )
    checkpoint_every: int | None = setting(
        None, "steps between checkpoints", at_least=1, default_text="a tenth of the run", resumable=True
    )
    patience: int = setting(
        0, "evaluations without a lower mean that end the run; 0 for none", at_least=0, resumable=True
    )
    min_improvement: float = setting(
        0.0,
        "share by which a mean must be lower to count for --patience and --plateau-patience",
        at_least=0,
        below=1,
        resumable=True,
    )
    max_minutes: float | None = setting(
        None, "end the run after so many minutes", above=0, default_text="no limit", resumable=True
    )
    schedule: str = setting(
        "cosine",
        "learning rate after the warmup: cosine falls to a tenth, plateau falls where validation does not",
        choices=("cosine", "constant", "plateau"),
        group="optimizer",
    )
    plateau_patience: int = setting(
        10,
        "evaluations without a lower mean that the plateau schedule lets pass",
        at_least=0,
        group="optimizer",
        resumable=True,
    )
    plateau_factor: float = setting(
        0.1,
        "of the learning rate, after more of them",
        above=0,
        below=1,
        group="optimizer",
        resumable=True,
    )
    warmup_steps: int = setting(20, "steps of linear warmup", at_least=0, group="optimizer")
    accumulate: int = setting(
        1, "parts of a batch, one backward each: less memory", at_least=1, group="optimizer", resumable=True
    )
    grad_clip: float = setting(1.0, "largest gradient norm; 0 does not clip", at_least=0, group="optimizer")

    def torch_device(self) -> torch.device:
        """The device that `device` names.

        Raises:
            ValueError: torch does not know it, or cannot compute on it here.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        name = local_device(name)
        try:
            probe = torch.zeros(1, device=name) + 1
            # the meta device computes nothing
            probe.item()
            return probe.device
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"device is {self.device!r}, which torch cannot use here: {reason}") from error

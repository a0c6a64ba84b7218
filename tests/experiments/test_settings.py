import argparse
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from ctxkern.experiments.core.settings import RunSettings, setting
from ctxkern.experiments.multifile.config import TrainConfig


@dataclass(kw_only=True)
class Sizes(RunSettings):
    presets: ClassVar = {"small": {"width": 2}}

    width: int = setting(64, "width, 100% of it", at_least=1, group="model")
    rate: float = setting(0.5, "a rate", above=0, below=2)
    kind: str = setting("a", "a kind", choices=("a", "b"), resumable=True)
    count: int | None = setting(None, "a count", at_least=1, default_text="as many as there are")
    flip: bool = setting(False, "flips")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 0, "width is 0; it must be an integer of at least 1"),
        ("width", 1.5, "width is 1.5; it must be an integer of at least 1"),
        ("width", True, "width is True; it must be an integer of at least 1"),
        ("width", None, "width is None; it must be an integer of at least 1"),
        ("width", "8", "width is '8'; it must be an integer of at least 1"),
        ("rate", 0, "rate is 0; it must be a number above 0 and below 2"),
        ("rate", 2, "rate is 2; it must be a number above 0 and below 2"),
        ("rate", float("nan"), "rate is nan; it must be a number above 0 and below 2"),
        ("grad_clip", float("inf"), "grad_clip is inf; it must be a number of at least 0"),
        ("kind", "c", "kind is 'c'; it must be one of a, b"),
        ("count", 0, "count is 0; it must be an integer of at least 1, or None"),
        ("flip", 1, "flip is 1; it must be true or false"),
        ("device", 3, "device is 3; it must be a string"),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(name, value, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**{name: value})


def test_values_of_other_number_types_become_plain():
    sizes = Sizes(width=np.int64(3), rate=1, count=np.int32(2))
    assert [type(value) for value in (sizes.width, sizes.rate, sizes.count)] == [int, float, int]


def parsed(*argv):
    parser = argparse.ArgumentParser()
    Sizes.add_flags(parser)
    return Sizes.given(parser.parse_args(argv))


def test_flags_are_those_of_the_fields_and_only_given_ones_count():
    assert parsed() == {}
    argv = ["--width", "3", "--rate", "1e-1", "--kind", "b", "--count", "4", "--flip", "--training-steps", "9"]
    expected = {"width": 3, "rate": 0.1, "kind": "b", "count": 4, "flip": True, "training_steps": 9}
    assert parsed(*argv) == expected
    assert parsed("--no-flip", "--steps", "5") == {"flip": False, "training_steps": 5}
    assert Sizes.flag("training_steps") == "--steps"
    assert Sizes.flag("count") == "--count"


@pytest.mark.parametrize("kind", [Sizes, TrainConfig])
def test_the_help_has_every_flag_under_its_group_with_its_default(kind):
    parser = argparse.ArgumentParser()
    kind.add_flags(parser)
    text = " ".join(parser.format_help().split())
    defaults = kind()
    for name, rule in kind.rules().items():
        value = getattr(defaults, name)
        default = rule.default or {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        default = rule.default or default
        assert default is not None, f"{name}: a default of None needs words"
        assert kind.flag(name) in text
        assert f"{rule.help} (default: {default})" in text
        assert f"{rule.group}:" in text


def test_presets_and_what_a_resumed_run_may_change():
    assert Sizes.preset("small", rate=1.0) == Sizes(width=2, rate=1.0)
    with pytest.raises(ValueError, match="preset is 'large'; it must be one of small"):
        Sizes.preset("large")
    assert set(Sizes.names()) - set(Sizes().fixed()) == {
        "training_steps", "device", "log_every", "tensorboard_dir", "eval_every", "checkpoint_every", "accumulate",
        "patience", "min_improvement", "plateau_patience", "plateau_factor", "max_minutes", "kind",
    }  # fmt: skip
    assert set(TrainConfig.names()) - set(TrainConfig().fixed()) == {
        "training_steps", "device", "num_workers", "log_every", "tensorboard_dir", "eval_every", "checkpoint_every",
        "accumulate", "patience", "min_improvement", "plateau_patience", "plateau_factor", "max_minutes",
    }  # fmt: skip

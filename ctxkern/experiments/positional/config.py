"""Settings of the experiments, and the grid that they span."""

from dataclasses import dataclass

import torch

from ctxkern.experiments.core.settings import RunSettings, Settings, setting

INITS = ("semantic", "positional", "random")
DTYPES = ("float32", "float64")
# a grid through the published points of Figure 2, close where the transition is expected
ALPHAS = "0.2,0.4,0.5075,0.6,0.8,1.005,1.1,1.2,1.3,1.4,1.6,1.8,2.0"


def numbers(name: str, text: str, least: float, most: float = float("inf")) -> tuple[float, ...]:
    """Numbers with commas between, ascending and once each."""
    found = []
    for word in text.split(","):
        try:
            number = float(word)
        except ValueError:
            raise ValueError(f"{name} has {word.strip()!r}; it must be numbers with commas between") from None
        if not least <= number <= most or number == float("inf"):
            limits = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
            raise ValueError(f"{name} has {number:g}; it must be numbers {limits}")
        found.append(number)
    return tuple(sorted(set(found)))


@dataclass(kw_only=True)
class TaskSettings(Settings):
    """What is learnt, as theory sees it too."""

    omegas: str = setting("0.3", "weight of A in the teacher; 0.1,0.3 for several", group="task")
    matrix: str = setting("0.6,0.4,0.4,0.6", "A of the teacher, by rows", group="task")
    sigma: float = setting(0.5, "standard deviation of a token's entries", above=0, group="task")
    alphas: str = setting(ALPHAS, "training samples divided by d", group="task")
    ridges: str = setting("0.01", "weight decay λ of the student", group="task")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_values()
        self.omega_values()
        self.ridge_values()
        self.matrix_values()

    def alpha_values(self) -> tuple[float, ...]:
        """α, ascending."""
        return numbers("alphas", self.alphas, 1e-9)

    def omega_values(self) -> tuple[float, ...]:
        """ω, ascending."""
        return numbers("omegas", self.omegas, 0, 1)

    def ridge_values(self) -> tuple[float, ...]:
        """λ, ascending."""
        return numbers("ridges", self.ridges, 0)

    def matrix_values(self) -> torch.Tensor:
        """A [2, 2], float64.

        Raises:
            ValueError: not four numbers.
        """
        words = self.matrix.split(",")
        try:
            numbers = torch.tensor([float(word) for word in words], dtype=torch.float64)
        except ValueError:
            numbers = torch.empty(0)
        if len(numbers) != 4 or not numbers.isfinite().all():
            raise ValueError(f"matrix is {self.matrix!r}; it must be four numbers with commas between")
        return numbers.view(2, 2)


@dataclass(kw_only=True)
class SweepSettings(TaskSettings):
    """A grid of experiments over α, ω, λ, initialisation and seed."""

    inits: str = setting("semantic,positional", f"of {', '.join(INITS)}", group="student")
    rank: int = setting(1, "columns of the student's Q", at_least=1, group="student")
    d: int = setting(1000, "width of a token", at_least=2, group="task")
    folds: int = setting(0, "parts for the cross-validation of every student; 0 for none", at_least=0, group="student")
    seeds: int = setting(24, "how many data sets and teachers, from --seed on", at_least=1, resumable=True)
    seed: int = setting(0, "of the first", at_least=0, resumable=True)
    independent: bool = setting(
        False, "draw the samples of every α apart, rather than take the first ones of one draw", group="task"
    )
    lr: float = setting(0.15, "learning rate", above=0, group="student")
    steps: int = setting(5000, "of full-batch gradient descent", at_least=0, group="student")
    test_samples: int = setting(50000, "on which a student is measured", at_least=1, group="task")
    linear_ridge: float = setting(1e-4, "weight decay of the linear baseline", at_least=0, group="student")
    dtype: str = setting("float32", "of the descent", choices=DTYPES)
    device: str = setting("cpu", "cpu, cuda, ...; auto is a GPU where there is one", resumable=True)
    seeds_at_once: int = setting(4, "seeds of one batch; each takes 24·α·d² bytes of memory", at_least=1)
    checkpoint_every: int = setting(500, "steps between checkpoints", at_least=1, resumable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_values()
        for alpha, count in zip(self.alpha_values(), self.counts(), strict=True):
            if count < 1:
                raise ValueError(f"alphas has {alpha:g}; it must be at least 1/d = {1 / self.d:g}, one sample")
        least = self.counts()[0]
        if self.folds == 1 or self.folds > least:
            raise ValueError(f"folds is {self.folds}; it must be 0, or from 2 to {least}, the samples at the least α")

    def init_values(self) -> tuple[str, ...]:
        """The initialisations, as given."""
        found = tuple(dict.fromkeys(word.strip() for word in self.inits.split(",")))
        for word in found:
            if word not in INITS:
                raise ValueError(f"inits has {word!r}; it must be of {', '.join(INITS)}")
        return found

    def counts(self) -> tuple[int, ...]:
        """Training samples at each α."""
        return tuple(round(alpha * self.d) for alpha in self.alpha_values())

    def torch_device(self) -> torch.device:
        """The device that `device` names.

        Raises:
            ValueError: torch cannot compute on it here.
        """
        return RunSettings(device=self.device).torch_device()

    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)


@dataclass(kw_only=True)
class CurveSettings(SweepSettings):
    """A grid with theory curves through it."""

    points: int = setting(
        2048, "of the sequence behind theory's expectations; 0: no theory", at_least=0, resumable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("semantic", "positional"):
            if name not in self.init_values():
                raise ValueError(f"inits is {self.inits!r}; it must have semantic and positional, which are compared")
        if len(self.ridge_values()) > 1:
            raise ValueError(f"ridges is {self.ridges!r}; it must be one number here")


@dataclass(kw_only=True)
class MapSettings(CurveSettings):
    """A coarse grid over α and ω."""

    alphas: str = setting("0.2,0.4,0.6,0.8,1.0,1.2,1.4,1.6,1.8,2.0", "training samples divided by d", group="task")
    omegas: str = setting("0.0,0.1,0.2,0.3,0.4,0.5", "weight of A in the teacher", group="task")
    seeds: int = setting(4, "how many data sets and teachers, from --seed on", at_least=1, resumable=True)
    seeds_at_once: int = setting(1, "seeds of one batch; each takes 24·α·d² bytes of memory", at_least=1)


@dataclass(kw_only=True)
class CrossSettings(SweepSettings):
    """λ, chosen by cross-validation."""

    alphas: str = setting("0.5,1.0,1.5,2.0", "training samples divided by d", group="task")
    ridges: str = setting("0.001,0.003,0.01,0.03,0.1", "weight decays λ to choose from", group="task")
    folds: int = setting(5, "parts, each held out once", at_least=2, group="student")
    seeds: int = setting(4, "how many data sets and teachers, from --seed on", at_least=1, resumable=True)
    seeds_at_once: int = setting(1, "seeds of one batch; each takes 24·α·d² bytes of memory", at_least=1)


@dataclass(kw_only=True)
class ConcentrationSettings(CurveSettings):
    """The same experiment at several widths."""

    alphas: str = setting("1.5", "training samples divided by d", group="task")
    widths: str = setting("100,200,400,800", "of a token, in place of --d", group="task")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.width_values()
        for name in ("alpha", "omega"):
            if len(getattr(self, f"{name}_values")()) > 1:
                raise ValueError(f"{name}s is {getattr(self, name + 's')!r}; it must be one number here")

    def width_values(self) -> tuple[int, ...]:
        """d, ascending.

        Raises:
            ValueError: not whole numbers of at least 2.
        """
        found = numbers("widths", self.widths, 2)
        for width in found:
            if width != int(width):
                raise ValueError(f"widths has {width:g}; it must be whole numbers")
        return tuple(map(int, found))


@dataclass(kw_only=True)
class TheorySettings(TaskSettings):
    """The grid of theory curves."""

    alphas: str = setting(
        "0.4,0.6,0.8,1.0,1.1,1.2,1.3,1.4,1.5,1.6,1.8,2.0", "training samples divided by d", group="task"
    )
    points: int = setting(2048, "of the quasi-random sequence behind expectations", at_least=16, resumable=True)

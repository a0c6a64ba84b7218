"""Settings of a multi-file training run."""

from dataclasses import asdict, dataclass, fields

import torch

from ctxkern.experiments.core.tokenizers import TOKENS
from ctxkern.experiments.multifile.data import LOSSES
from ctxkern.experiments.multifile.model import MultiFileConfig

debug_config = {
    "num_files": 2,
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 2,
    "context_dim": 16,
    "batch_size": 4,
    "seq_len": 32,
    "training_steps": 1,
    "device": "cpu",
}

PRESETS = {"debug": debug_config}
DTYPES = ("float32", "bfloat16", "float64")
SCHEDULES = ("cosine", "constant")
# free to differ between the parts of one run
RESUMABLE = ("training_steps", "device", "num_workers", "eval_every", "checkpoint_every")


@dataclass
class TrainConfig:
    """Settings of ``ctxkern train``; ``TrainConfig(**debug_config)`` is the smallest run.

    Attributes:
        num_files: use the first so many paths; None uses all.
        d_model, n_heads, n_layers, context_dim, seq_len, dropout, init, attention: see :class:`MultiFileConfig`.
        batch_size: windows a step; less where the data has fewer.
        training_steps: optimizer steps.
        device: ``"auto"`` takes a GPU where there is one.
        dtype: of the computation; ``"bfloat16"`` is autocast over float32 parameters.
        lr, schedule, warmup_steps: peak learning rate; linear warmup, then ``"cosine"`` down to a tenth, or constant.
        bilinear_lr_scale: learning rate of the bilinear tensors over ``lr``; None takes 1 / ``context_dim``. A file's
            weight is a sum over ``context_dim`` entries, which Adam moves by equal amounts: at scale 1 the modulated
            weights would run ahead of the base.
        weight_decay: of weight matrices (not of embeddings, norms, biases).
        bilinear_weight_decay: of the bilinear tensors; None takes ``weight_decay``.
        grad_clip: largest gradient norm; 0 does not clip.
        tokens: ``"chars"`` or ``"bytes"``.
        loss: ``"target"`` labels the answers only, ``"all"`` the prompts too.
        val_fraction: share of each file set apart.
        balanced: every file gets the same share of the batches.
        seed: of weights, split, batches and dropout.
        num_workers: processes that collate batches.
        eval_every, checkpoint_every: steps between; None takes a tenth of the run.
        eval_windows: the most validation windows of a file.
    """

    num_files: int | None = None
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    context_dim: int = 16
    batch_size: int = 16
    seq_len: int = 128
    training_steps: int = 400
    device: str = "auto"
    dtype: str = "float32"
    lr: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 20
    bilinear_lr_scale: float | None = None
    weight_decay: float = 0.01
    bilinear_weight_decay: float | None = None
    grad_clip: float = 1.0
    dropout: float = 0.0
    tokens: str = "chars"
    loss: str = "target"
    init: str = "normal"
    attention: str = "fused"
    val_fraction: float = 0.1
    balanced: bool = False
    seed: int = 0
    num_workers: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = None
    eval_windows: int = 16

    def __post_init__(self):
        for name in ("batch_size", "training_steps", "eval_windows", "num_files", "eval_every", "checkpoint_every"):
            self._check(name, lambda value: value is None or value >= 1, "at least 1")
        not_negative = ("warmup_steps", "grad_clip", "num_workers", "weight_decay", "bilinear_weight_decay")
        for name in (*not_negative, "bilinear_lr_scale"):
            self._check(name, lambda value: value is None or value >= 0, "0 or more")
        self._check("lr", lambda value: value > 0, "a positive number")
        self._check("val_fraction", lambda value: 0 <= value < 1, "a share in [0, 1)")
        choices = {"dtype": DTYPES, "tokens": TOKENS, "loss": LOSSES, "schedule": SCHEDULES}
        for name, values in choices.items():
            self._check(name, lambda value, values=values: value in values, f"one of {values}")
        # the model checks its own sizes
        self.model_config(1, 1)

    def _check(self, name: str, valid, takes: str) -> None:
        if not valid(getattr(self, name)):
            raise ValueError(f"{name}: got {getattr(self, name)!r}, takes {takes}")

    @classmethod
    def preset(cls, name: str, **changes) -> "TrainConfig":
        """The preset ``name`` with ``changes``.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, takes one of {tuple(PRESETS)}")
        return cls(**PRESETS[name] | changes)

    @classmethod
    def names(cls) -> list[str]:
        return [entry.name for entry in fields(cls)]

    def model_config(self, vocab_size: int, num_files: int) -> MultiFileConfig:
        """The model's share of the settings."""
        names = ("d_model", "n_heads", "n_layers", "context_dim", "seq_len", "dropout", "init", "attention")
        return MultiFileConfig(vocab_size, num_files, **{name: getattr(self, name) for name in names})

    def fixed(self) -> dict:
        """The settings that all parts of a resumed run must share."""
        return {name: value for name, value in asdict(self).items() if name not in RESUMABLE}

    def torch_device(self) -> torch.device:
        """The device named by ``device``.

        Raises:
            ValueError: torch does not know it, or it is not there.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: got {self.device!r}, which torch cannot use here: {reason}") from error

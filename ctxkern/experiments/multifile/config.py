"""Settings of a multi-file training run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ctxkern.experiments.core.data.windows import LOSSES
from ctxkern.experiments.core.settings import RunSettings, setting
from ctxkern.experiments.core.tokenizers import TOKENS
from ctxkern.experiments.multifile.model import ModelSettings, MultiFileConfig

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

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(kw_only=True)
class TrainConfig(ModelSettings, RunSettings):
    """Settings of `ctxkern train`; `TrainConfig(**debug_config)` is the smallest run.

    The bilinear tensors have a learning rate of their own because a file's weight is a sum over `context_dim` entries,
    which Adam moves by equal amounts: at scale 1 the modulated weights would outrun the base weights. Factors of a
    rank move them as one more matrix does.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"debug": debug_config}

    num_files: int | None = setting(
        None, "use the first so many readable files", at_least=1, default_text="all", group="data"
    )
    only: str | None = setting(
        None, "train on this file alone, with the split and vocabulary of all", default_text="all files", group="data"
    )
    tokens: str = setting("chars", "what a token is", choices=TOKENS, group="data")
    loss: str = setting("target", "label the answers only, or the prompts too", choices=LOSSES, group="data")
    val_fraction: float = setting(0.1, "share of each file set apart", at_least=0, below=1, group="data")
    balanced: bool = setting(
        False, "give every file the same share of the batches, rather than by its size", group="data"
    )
    augment: int = setting(
        0, "variants of each ARC task, turned and recoloured, each with a context", at_least=0, group="data"
    )
    num_workers: int = setting(0, "processes that prepare batches", at_least=0, resumable=True, group="data")
    patience: int = setting(
        3, "evaluations without a lower mean that end the run; 0 for none", at_least=0, resumable=True
    )
    batch_size: int = setting(16, "windows per step, fewer where the data has fewer", at_least=1)
    dtype: str = setting("float32", "of the computation; bfloat16 is autocast", choices=DTYPES)
    eval_windows: int = setting(16, "the most validation windows per file", at_least=1)
    lr: float = setting(2e-3, "peak learning rate", above=0, group="optimizer")
    bilinear_lr_scale: float | None = setting(
        None,
        "learning rate of the bilinear tensors, divided by --lr",
        at_least=0,
        default_text="1 / context-dim, or 1 with --rank",
        group="optimizer",
    )
    context_lr_scale: float = setting(
        10.0, "learning rate of the context vectors, divided by --lr", at_least=0, group="optimizer"
    )
    weight_decay: float = setting(0.01, "of weight matrices", at_least=0, group="optimizer")
    bilinear_weight_decay: float | None = setting(
        None, "of bilinear tensors", at_least=0, default_text="that of --weight-decay", group="optimizer"
    )
    norm_penalty: float = setting(
        0.0, "added to the loss, times the mean square of the bilinear tensors' entries", at_least=0, group="optimizer"
    )
    rank_penalty: float = setting(
        0.0,
        "added to the loss, times the bilinear tensors' singular values along K over √(D·E·K)",
        at_least=0,
        group="optimizer",
    )

    def model_config(self, vocab_size: int, num_files: int) -> MultiFileConfig:
        """The model's share of the settings."""
        sizes = {name: getattr(self, name) for name in ModelSettings.names()}
        return MultiFileConfig(vocab_size, num_files, **sizes)

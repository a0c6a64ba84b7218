"""Settings of a character GPT and of a run that trains it."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from ctxkern.experiments.core.settings import RunSettings, Settings, setting
from ctxkern.nn.block import ACTIVATIONS, NORMS

# the sizes, and what its text says of rates and plateaus, of the script that the post-norm form is from
document = {
    "d_model": 512,
    "n_heads": 8,
    "n_layers": 8,
    "block_size": 128,
    "norm": "post",
    "activation": "relu",
    "dropout": 0.14,
    "batch_size": 64,
    "chunk_windows": 64,
    "training_steps": 12000,
    "lr": 3e-6,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "schedule": "plateau",
    "warmup_steps": 0,
    "grad_clip": 0.0,
    "plateau_patience": 10,
    "plateau_factor": 0.1,
    "patience": 25,
    "eval_every": 100,
    "eval_iters": 100,
}
debug = {"d_model": 16, "n_heads": 2, "n_layers": 1, "block_size": 16, "batch_size": 4, "training_steps": 4}


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """Sizes of a `GPT` that do not depend on the text.

    Raises:
        ValueError: a value that a setting does not accept; `d_model` is not a multiple of `n_heads`.
    """

    n_layers: int = setting(4, "transformer blocks", at_least=1, flags=("--n-layers", "--n-layer"), group="model")
    n_heads: int = setting(
        4, "attention heads, a divisor of the width", at_least=1, flags=("--n-heads", "--n-head"), group="model"
    )
    d_model: int = setting(128, "width of the model", at_least=1, flags=("--d-model", "--n-embd"), group="model")
    block_size: int = setting(64, "characters that the model sees at once", at_least=1, group="model")
    mlp_ratio: float = setting(4.0, "width of the MLP divided by that of the model", at_least=0, group="model")
    dropout: float = setting(0.0, "share dropped in training", at_least=0, below=1, group="model")
    norm: str = setting("pre", "norms before attention and MLP, after the sum, or none", choices=NORMS, group="model")
    activation: str = setting("gelu", "of the MLP", choices=tuple(ACTIVATIONS), group="model")
    init_std: float = setting(0.02, "standard deviation of weights at step 0", above=0, group="model")
    context_dim: int = setting(
        0, "length of a file's context vector, which modulates attention; 0 for none", at_least=0, group="model"
    )
    rank: int | None = setting(
        None,
        "keep bilinear tensors by CP factors of this rank",
        at_least=1,
        default_text="the whole tensors",
        group="model",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must be a divisor of d_model = {self.d_model}")
        if self.rank is not None and not self.context_dim:
            raise ValueError(f"rank is {self.rank}; it must be None without contexts (context_dim = 0)")


@dataclass
class GPTConfig(ModelSettings):
    """Everything that a `GPT` is built from: `vocab_size` and `num_files` are the rows of its embeddings of characters
    and of files; `residual` and `out_proj` leave parts of its blocks out, see `TransformerBlock`."""

    vocab_size: int = setting(MISSING, "rows of the token embeddings", at_least=1)
    num_files: int = setting(1, "rows of the context embeddings", at_least=1)
    residual: bool = field(default=True, kw_only=True)
    out_proj: bool = field(default=True, kw_only=True)


@dataclass(kw_only=True)
class TextSettings(RunSettings):
    """What runs on characters of texts share.

    Raises:
        ValueError: a value that a setting does not accept.
    """

    vocab: str | None = setting(
        None, "text whose characters are the vocabulary", default_text="those of PATHS", group="data", is_path=True
    )
    val_fraction: float = setting(0.1, "share of each text set apart, its end", at_least=0, below=1, group="data")
    val_file: str | None = setting(
        None, "text to validate on", default_text="the ends of PATHS", group="data", is_path=True
    )
    balanced: bool = setting(False, "draw all files equally often, rather than by their sizes", group="data")
    chunk_windows: int = setting(
        1, "windows of a batch that are drawn from one chunk of a text, as many windows long", at_least=1, group="data"
    )
    batch_size: int = setting(12, "windows of a step", at_least=1)
    eval_iters: int = setting(20, "batches of an estimate of a loss", at_least=1)
    final_characters: int = setting(
        2_000_000, "the most characters of a validation text for the loss at the end, its first", at_least=2
    )
    lr: float = setting(1e-3, "peak learning rate", above=0, group="optimizer")
    beta2: float = setting(0.99, "AdamW's second decay", at_least=0, below=1, group="optimizer")
    weight_decay: float = setting(0.1, "of weight matrices", at_least=0, group="optimizer")


@dataclass(kw_only=True)
class GPTSettings(ModelSettings, TextSettings):
    """Settings of `ctxkern gpt train`. The defaults are the sizes and rates of nanoGPT for a CPU and tiny Shakespeare.

    Source: github.com/karpathy/nanoGPT, its README on training without a GPU.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"document": document, "debug": debug}

    training_steps: int = setting(
        2000, "training steps", at_least=1, flags=("--steps", "--training-steps", "--max-iters"), resumable=True
    )
    warmup_steps: int = setting(100, "steps of linear warmup", at_least=0, group="optimizer")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_file is not None and self.context_dim:
            raise ValueError(
                f"val_file is {self.val_file!r}; it must be left out with contexts: it is no file that has one"
            )

    def model_config(self, vocab_size: int, num_files: int) -> GPTConfig:
        """The model's share of the settings."""
        sizes = {name: getattr(self, name) for name in ModelSettings.names()}
        return GPTConfig(vocab_size=vocab_size, num_files=num_files, **sizes)

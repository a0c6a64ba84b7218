"""`ctxkern ladder train`: one rung of the ladder on the characters of texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ctxkern.experiments.core.experiment import Inputs
from ctxkern.experiments.core.groups import modulated_groups
from ctxkern.experiments.core.memory import build_model
from ctxkern.experiments.core.seeding import derive_seed
from ctxkern.experiments.core.settings import setting
from ctxkern.experiments.gpt.config import GPTConfig, TextSettings
from ctxkern.experiments.gpt.experiment import CharTraining
from ctxkern.experiments.gpt.train import CharJob, adamw, read_texts
from ctxkern.experiments.ladder.rungs import RUNGS, build


@dataclass(kw_only=True)
class LadderSettings(TextSettings):
    """Settings of `ctxkern ladder train`: small enough for a minute on one core."""

    rung: str = setting("norm", "which model", choices=tuple(RUNGS), group="model")
    d_model: int = setting(32, "width of all rungs but the bigrams", at_least=1, group="model")
    n_heads: int = setting(4, "heads from the rung of several on, a divisor of the width", at_least=1, group="model")
    n_layers: int = setting(3, "blocks from the rung with residual connections on", at_least=1, group="model")
    block_size: int = setting(8, "characters that a model sees at once", at_least=1, group="model")
    init_std: float = setting(0.2, "standard deviation of weights at step 0", above=0, group="model")
    batch_size: int = setting(32, "windows of a step", at_least=1)
    training_steps: int = setting(
        5000, "training steps", at_least=1, flags=("--steps", "--training-steps"), resumable=True
    )
    eval_iters: int = setting(100, "batches of an estimate of a loss", at_least=1)
    bigram_lr: float = setting(
        1e-2, "learning rate of the bigrams, whose table has one row a step", above=0, group="optimizer"
    )
    schedule: str = setting(
        "constant", "learning rate after the warmup", choices=("cosine", "constant", "plateau"), group="optimizer"
    )
    warmup_steps: int = setting(0, "steps of linear warmup", at_least=0, group="optimizer")
    beta2: float = setting(0.999, "AdamW's second decay", at_least=0, below=1, group="optimizer")
    weight_decay: float = setting(0.01, "of weight matrices", at_least=0, group="optimizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must be a divisor of d_model = {self.d_model}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The sizes of the last rung."""
        return GPTConfig(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            block_size=self.block_size,
            activation="relu",
            init_std=self.init_std,
        )


class LadderTraining(CharTraining):
    """One rung."""

    settings = LadderSettings
    help = "train one of the models between bigrams and a transformer"
    description = "Train one rung of the ladder on random windows of texts:\n" + "\n".join(
        f"  {name:<13}{rung.new}" for name, rung in RUNGS.items()
    )
    examples: ClassVar = ("shakespeare.txt --rung heads --run-dir runs/heads",)

    def prepare(self, config: LadderSettings, inputs: Inputs) -> CharJob:
        device = config.torch_device()
        data = read_texts(config, inputs)

        def make() -> nn.Module:
            torch.manual_seed(derive_seed(config.seed, "weights"))
            return build(config.rung, config.model_config(data.tokenizer.vocab_size))

        model = build_model(make, device, torch.float32, "d_model, n_layers or block_size")
        lr = config.bigram_lr if config.rung == "bigram" else config.lr
        groups = modulated_groups(
            model, lr=lr, context_lr=lr, bilinear_lr=lr, weight_decay=config.weight_decay, bilinear_weight_decay=0.0
        )
        return CharJob(config, data, model, adamw(groups, config, device), config.block_size)

    def title(self, job: CharJob) -> str:
        return f"ladder: {RUNGS[job.config.rung].new}"

"""Settings of a run that trains a TaskWeaver; each has a flag with underscores, and the same with dashes."""

import dataclasses
import functools
from dataclasses import dataclass

from ctxkern.experiments.core.settings import Rule, RunSettings, setting
from ctxkern.experiments.taskweaver.configs import DatasetConfig, read_configs
from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaverConfig
from ctxkern.experiments.taskweaver.processors import MAX_LENGTH

# names of other trainers for what the loop has
_ALSO = {
    "accumulate": "gradient_accumulation_steps",
    "checkpoint_every": "save_steps",
    "log_every": "logging_steps",
    "training_steps": "steps",
}
PROMPT, SHARED, DATASET = WEIGHTS = ("prompt", "shared", "dataset")
_DEFAULT_DATASET = ("openai/gsm8k", "main")


@dataclass(kw_only=True)
class TaskWeaverSettings(TaskWeaverConfig, RunSettings):
    """Settings of `ctxkern taskweaver train`."""

    dataset_config: str = setting("", "JSON file that lists datasets", default_text="none", group="data", is_path=True)
    use_default_dataset: bool = setting(False, "train on GSM8K alone", group="data")
    dataset_path: str = setting(
        "",
        "file or folder of the default dataset",
        default_text=f"{_DEFAULT_DATASET[0]} of the hub",
        group="data",
        is_path=None,
    )
    max_length: int = setting(MAX_LENGTH, "longest example in tokens; longer ones are cut", at_least=4, group="data")
    val_fraction: float = setting(0.1, "share of each dataset's examples set apart", at_least=0, below=1, group="data")
    eval_examples: int = setting(
        64, "the most validation examples of a dataset", at_least=1, resumable=True, group="data"
    )
    cached_prompts: int = setting(
        65536, "the most prompts whose embeddings are kept in memory", at_least=0, resumable=True, group="data"
    )
    weights: str = setting(
        PROMPT,
        "what has LoRA weights: each prompt, by the hypernetwork; or, to compare with, one adapter that is shared, or "
        "one of each dataset",
        choices=WEIGHTS,
        group="hypernetwork",
    )
    adapter_rank: int = setting(
        0,
        "rank of the adapters that do not depend on the prompt",
        at_least=0,
        default_text="together as many parameters as the hypernetwork",
        group="hypernetwork",
    )
    lora_dropout: float = setting(
        0.0, "share of a target layer's input hidden from its weights", at_least=0, below=1, group="hypernetwork"
    )
    batch_size: int = setting(16, "examples of a step", at_least=1, group="optimizer")
    learning_rate: float = setting(5e-5, "learning rate of the hypernetwork", above=0, group="optimizer")
    weight_decay: float = setting(0.0, "of the hypernetwork", at_least=0, group="optimizer")
    num_epochs: int = setting(3, "times through the examples, unless --steps is given", at_least=1)
    training_steps: int = setting(0, "training steps", at_least=0, default_text="those of num_epochs", resumable=True)
    fp16: bool = setting(False, "compute with the language model in float16")
    bf16: bool = setting(False, "compute with the language model in bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both given; one of them must be left out")
        if self.use_default_dataset == bool(self.dataset_config):
            said = "both are given" if self.dataset_config else "neither is given"
            raise ValueError(f"dataset_config and use_default_dataset: {said}; one of them must be")
        if self.dataset_path and not self.use_default_dataset:
            raise ValueError("dataset_path is given without use_default_dataset; it must be left out")
        if self.adapter_rank and self.weights == PROMPT:
            raise ValueError(f"adapter_rank is {self.adapter_rank} and weights {PROMPT!r}; it must be left out")

    @classmethod
    @functools.cache
    def rules(cls) -> dict[str, Rule]:
        """The rule of each setting by name."""
        found = {}
        for name, rule in super().rules().items():
            names = (_ALSO[name], name) if name in _ALSO else (name,)
            flags = [f"--{form}" for plain in names for form in (plain, plain.replace("_", "-"))]
            group = "hypernetwork" if name in TaskWeaverConfig.names() else rule.group
            found[name] = dataclasses.replace(rule, flags=tuple(dict.fromkeys(flags)), group=group)
        return found

    def datasets(self) -> list[DatasetConfig]:
        """The entries of the configuration.

        Raises:
            OSError, ValueError: as `read_configs`.
        """
        if not self.use_default_dataset:
            return read_configs(self.dataset_config)
        path, inner = (self.dataset_path, None) if self.dataset_path else _DEFAULT_DATASET
        return [DatasetConfig("gsm8k", path, inner, place="default dataset")]

    def weaver(self) -> TaskWeaverConfig:
        """The settings of the hypernetwork."""
        return TaskWeaverConfig(**{name: getattr(self, name) for name in TaskWeaverConfig.names()})

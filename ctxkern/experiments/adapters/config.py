"""Settings of a run that trains a bank of adapters."""

from dataclasses import dataclass

from ctxkern.experiments.core.settings import RunSettings, setting

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(kw_only=True)
class AdapterSettings(RunSettings):
    """Settings of `ctxkern adapters train`."""

    model: str = setting(
        "", "folder or hub name of a causal language model", default_text="must be given", is_path=None
    )
    data: str = setting(
        "", "folder with a file or a folder for each adapter", default_text="must be given", group="data", is_path=True
    )
    seq_len: int = setting(256, "longest sequence in tokens; longer ones are cut", at_least=2, group="data")
    val_fraction: float = setting(0.1, "share of each adapter's examples set apart", at_least=0, below=1, group="data")
    eval_windows: int = setting(16, "the most validation sequences per adapter", at_least=1, resumable=True)
    rank: int = setting(8, "of every adapter", at_least=1, group="adapters")
    alpha: float = setting(16.0, "LoRA's scale is alpha / rank", above=0, group="adapters")
    targets: str = setting(
        "auto", "layers by name or glob, with commas between; auto: the projections of attention", group="adapters"
    )
    slots: int | None = setting(
        None, "room in the bank", at_least=1, default_text="the adapters of the data and 8 more", group="adapters"
    )
    rows: int = setting(1, "sequences of each adapter in a step", at_least=1, group="adapters")
    adapters_per_step: int | None = setting(
        None, "how many adapters a batch mixes", at_least=1, default_text="all that train", group="adapters"
    )
    dtype: str = setting("float32", "of the frozen model; adapters are float32 at least", choices=DTYPES)
    checkpointing: bool = setting(False, "compute activations again in the backward: less memory", resumable=True)
    lr: float = setting(1e-3, "learning rate where adapters.json names no other", above=0, group="optimizer")
    adapter_steps: int | None = setting(
        None, "steps of each adapter", at_least=1, default_text="those of the run", group="optimizer"
    )
    weight_decay: float = setting(0.0, "of the adapters", at_least=0, group="optimizer")

"""Training programs built on the layers of `ctxkern`; they need `pip install 'ctxkern[train]'`.

`EXPERIMENTS` lists them: the subcommand of `ctxkern`, of two words where it is one of a group, and the `Experiment`
class behind it. `GROUPS` has each group's help and the module with `add_parsers(subparsers)` of its other commands;
those of "" are in none.
"""

EXPERIMENTS = {
    "train": "ctxkern.experiments.multifile.experiment:MultiFileTraining",
    "adapters train": "ctxkern.experiments.adapters.experiment:AdapterTraining",
    "taskweaver train": "ctxkern.experiments.taskweaver.experiment:TaskWeaverTraining",
    "gpt train": "ctxkern.experiments.gpt.experiment:GPTTraining",
    "ladder train": "ctxkern.experiments.ladder.experiment:LadderTraining",
}
GROUPS = {
    "": ("", "ctxkern.experiments.multifile.commands"),
    "adapters": ("a bank of LoRA adapters on one language model", "ctxkern.experiments.adapters.commands"),
    "positional": (
        "positional and semantic learning: many students of one attention layer at a time, and theory",
        "ctxkern.experiments.positional.commands",
    ),
    "taskweaver": ("LoRA weights from the prompt, by a hypernetwork", "ctxkern.experiments.taskweaver.commands"),
    "gpt": ("a GPT on the characters of texts", "ctxkern.experiments.gpt.commands"),
    "ladder": ("from averaging to attention, one part at a time", "ctxkern.experiments.ladder.commands"),
}

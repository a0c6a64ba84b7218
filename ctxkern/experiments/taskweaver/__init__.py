"""TaskWeaver: a hypernetwork that writes LoRA weights for a language model from the prompt."""

from ctxkern.experiments.taskweaver.hypernetwork import TaskWeaver, TaskWeaverConfig

__all__ = ["TaskWeaver", "TaskWeaverConfig"]

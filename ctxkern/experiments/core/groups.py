"""Optimizer groups of a model whose weights contexts modulate."""

from torch import nn


def is_bilinear(name: str) -> bool:
    """Whether a parameter of this name is one of the bilinear tensors, or a factor of one."""
    return any(part.startswith("bilinear_") for part in name.split("."))


def modulated_groups(
    model: nn.Module,
    *,
    lr: float,
    context_lr: float,
    bilinear_lr: float,
    weight_decay: float,
    bilinear_weight_decay: float,
) -> list[dict]:
    """Groups for a `torch.optim` optimizer: weight matrices, bilinear tensors, context vectors, and the rest, which are
    embeddings and vectors, without decay.

    Args:
        model: its context vectors are named `context_embeddings...`, its other embeddings `...embeddings...`.
        lr: learning rate of all but bilinear tensors and context vectors.
        context_lr, bilinear_lr: learning rates of these.
        weight_decay: of matrices.
        bilinear_weight_decay: of bilinear tensors.
    """
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "bilinear": [], "context": [], "plain": []}
    for name, parameter in model.named_parameters():
        if is_bilinear(name):
            kinds["bilinear"].append(parameter)
        elif name.startswith("context_embeddings"):
            kinds["context"].append(parameter)
        elif parameter.dim() >= 2 and "embeddings" not in name:
            kinds["matrix"].append(parameter)
        else:
            kinds["plain"].append(parameter)
    settings = {
        "matrix": {"lr": lr, "weight_decay": weight_decay},
        "bilinear": {"lr": bilinear_lr, "weight_decay": bilinear_weight_decay},
        "context": {"lr": context_lr, "weight_decay": 0.0},
        "plain": {"lr": lr, "weight_decay": 0.0},
    }
    return [{"params": params, **settings[kind]} for kind, params in kinds.items() if params]

"""A new file for a trained model: only its context vector is learned."""

from collections.abc import Iterable, Mapping

import torch
from torch.func import functional_call

from ctxkern.experiments.core.modes import eval_mode
from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.experiments.multifile.train import criterion

_CONTEXT = "context_embeddings.weight"


def adapt_file(
    model: MultiFileTransformer,
    file_id: int,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    lr: float = 0.05,
    weight_decay: float = 0.0,
) -> list[float]:
    """Train the context vector of `file_id` with Adam, one step per batch; every other weight keeps its bits.

    Args:
        model: in eval mode during the call, so without dropout.
        file_id: from `MultiFileTransformer.add_file`, or an older file.
        batches: of `Collator`; the file ids in them are ignored.
        lr: learning rate.
        weight_decay: decoupled, towards zero.

    Returns:
        The loss of each batch before its step.

    Raises:
        ValueError: no such file, or a model whose files have no contexts.
    """
    if model.context_embeddings is None:
        raise ValueError(f"model has the form {model.config.form}; it must have contexts")
    if not 0 <= file_id < model.config.num_files:
        raise ValueError(f"file_id is {file_id}; it must be from 0 to {model.config.num_files - 1}")
    weight = model.context_embeddings.weight
    vector = weight[file_id : file_id + 1].detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([vector], lr=lr, weight_decay=weight_decay)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            for batch in batches:
                inputs = batch["input"].to(weight.device)
                kwargs = {"file_ids": torch.zeros(len(inputs), dtype=torch.int64, device=weight.device)}
                if batch.get("padding_mask") is not None:
                    kwargs["padding_mask"] = batch["padding_mask"].to(weight.device)
                outputs = functional_call(model, {_CONTEXT: vector}, (inputs,), kwargs)
                loss = criterion(outputs, batch["target"].to(weight.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        with torch.no_grad():
            weight[file_id] = vector[0]
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return losses

"""How much contexts modulate a model: numbers for logs, and penalties."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ctxkern.experiments.multifile.model import MultiFileTransformer
from ctxkern.nn import BilinearFactors

_NAMES = ("q", "k", "v")


def projections(model: MultiFileTransformer) -> Iterator[tuple[Tensor, Tensor]]:
    """(base weight [E, D], bilinear tensor [D, E, K]) of every projection; differentiable."""
    for block in model.blocks:
        layer: nn.Module = block.attention
        if not hasattr(layer, "bilinear_q"):
            return
        for name in _NAMES:
            bilinear = getattr(layer, f"bilinear_{name}")
            whole = bilinear.tensor() if isinstance(bilinear, BilinearFactors) else bilinear
            yield getattr(layer, f"W_{name}_base").weight, whole


def gram(bilinear: Tensor) -> Tensor:
    """[K, K]: the inner products of the slices along K of a tensor [D, E, K], in float32 or wider."""
    flat = bilinear.flatten(0, 1)
    flat = flat.float() if flat.dtype.itemsize < 4 else flat
    return flat.mT @ flat


def penalty(model: MultiFileTransformer, *, norm: float = 0.0, rank: float = 0.0) -> Tensor:
    """A scalar to add to the loss: `norm` times the mean square of each bilinear tensor's entries, and `rank` times the
    sum of its singular values along K over √(D·E·K), summed over projections; differentiable."""
    total = torch.zeros((), device=model.token_embeddings.weight.device)
    for _, bilinear in projections(model):
        products, count = gram(bilinear), bilinear.numel()
        total = total + norm * products.diagonal().sum() / count
        if rank:
            squares = torch.linalg.eigvalsh(products)
            # the root is not differentiable at 0, and below this a square is rounding
            least = squares[-1].detach() * torch.finfo(products.dtype).eps + torch.finfo(products.dtype).tiny
            values = squares.clamp(min=least).sqrt()
            total = total + rank * values.sum() / count**0.5
    return total


@torch.no_grad()
def movement(model: MultiFileTransformer, start: Tensor) -> dict[str, float]:
    """Numbers that say whether modulation does anything.

    Args:
        model: the model.
        start: its contexts [F, K] at step 0.

    Returns:
        `weight_change`: ‖ΔW‖ / ‖W‖, root mean squares over files and projections; about 0.25 where runs went well.
        `context_movement`: 1 − the cosine of each context and itself at step 0, mean over files.
        Models without bilinear tensors have no `weight_change`, those without contexts neither.
    """
    contexts = model.contexts()
    if not contexts.shape[1]:
        return {}
    wide = contexts.double()
    change = base = 0.0
    for weight, bilinear in projections(model):
        change += float(((wide @ gram(bilinear).double()) * wide).sum()) / len(wide)
        base += float(weight.double().square().sum())
    cosine = nn.functional.cosine_similarity(wide[: len(start)], start.to(wide)[: len(wide)])
    moved = {"context_movement": float(1 - cosine.mean())}
    return ({"weight_change": (change / base) ** 0.5} if base else {}) | moved

"""Initialisation of bilinear tensors, so that a fresh modulated weight is near an ordinary one.

With contexts of standard deviation `context_std`, Σ_k bilinear[d, e, k] c[k] has variance K·var(bilinear)·context_std².
An ordinary linear weight has variance 1 / (3 D) (nn.Linear). With standard normal tensors (`randn`) the modulated part
is 3·K·D times that: attention scores of ≈ 1000 and a saturated softmax from the first step.
"""

from __future__ import annotations

import torch

MODES = ("normal", "hyperfan", "low_rank", "randn")


@torch.no_grad()
def init_bilinear_(
    bilinear: torch.Tensor, mode: str = "normal", *, context_std: float = 1.0, rank: int = 4
) -> torch.Tensor:
    """Fills a bilinear tensor in place.

    Args:
        bilinear: [D, E, K].
        mode: one of
            `normal`: the modulated part is a tenth of an ordinary weight, so that W_b starts near `weight`.
            `hyperfan`: it has the variance of an ordinary weight, 1 / (3 D).
            `low_rank`: as `normal`, with the unfolded tensor [D, E·K] of rank `rank`.
            `randn`: standard normal; it saturates attention and is kept for comparison.
            There is no `zeros`: together with a zero context, nothing would learn.
        context_std: standard deviation of the contexts' entries.
        rank: for `low_rank`.

    Returns:
        The tensor.

    Raises:
        ValueError: an unknown mode.

    Source: Chang et al., Principled Weight Initialization for Hypernetworks (2020), the fan-in form, for `hyperfan`.

    Example:
        >>> bilinear = init_bilinear_(torch.empty(64, 64, 16), "hyperfan")
        >>> bilinear.std().item() < 0.02
        True
    """
    _check_mode("init_bilinear_", mode)
    d_in, d_out, context_dim = bilinear.shape
    if bilinear.numel() == 0:
        return bilinear
    if mode == "randn":
        return bilinear.normal_()
    std = (3 * d_in * context_dim) ** -0.5 / context_std
    if mode == "hyperfan":
        return bilinear.normal_(std=std)
    if mode == "normal":
        return bilinear.normal_(std=0.1 * std)
    rank = min(rank, d_in, d_out * context_dim)
    left = torch.randn(d_in, rank, device=bilinear.device, dtype=bilinear.dtype)
    right = torch.randn(rank, d_out * context_dim, device=bilinear.device, dtype=bilinear.dtype)
    return bilinear.copy_((left @ right).view_as(bilinear) * (0.1 * std * rank**-0.5))


@torch.no_grad()
def init_factors_(
    in_factor: torch.Tensor,
    context_factor: torch.Tensor,
    out_factor: torch.Tensor,
    mode: str = "normal",
    *,
    context_std: float = 1.0,
) -> None:
    """Fills the CP factors of a bilinear tensor in place, so that weights start as far from the shared one as those of
    the whole tensor under `init_bilinear_`.

    Inner products x · in_factor and gates have a variance of 1 for such x and contexts; the scale is in out_factor.

    Args:
        in_factor: [D, R]. context_factor: [K, R]. out_factor: [R, E].
        mode: `normal` and `low_rank`: the modulated part is a tenth of an ordinary weight. `hyperfan`: it has the
            variance of an ordinary weight. `randn`: standard normal factors, for comparison.
        context_std: standard deviation of the contexts' entries.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> in_factor, context_factor, out_factor = torch.empty(64, 8), torch.empty(16, 8), torch.empty(8, 32)
        >>> init_factors_(in_factor, context_factor, out_factor)
        >>> in_factor.std().item() < 0.2
        True
    """
    _check_mode("init_factors_", mode)
    factors = (in_factor, context_factor, out_factor)
    (d_in, rank), context_dim = in_factor.shape, context_factor.shape[0]
    if mode == "randn":
        stds = (1.0, 1.0, 1.0)
    else:
        share = 1.0 if mode == "hyperfan" else 0.1
        stds = (max(d_in, 1) ** -0.5, max(context_dim, 1) ** -0.5 / context_std, share * (3 * rank) ** -0.5)
    for factor, std in zip(factors, stds, strict=True):
        factor.normal_(std=std)


def _check_mode(op: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: init is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")

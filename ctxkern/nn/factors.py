"""A bilinear tensor by its CP factors."""

from __future__ import annotations

import torch
from torch import nn

from .init import init_factors_


class BilinearFactors(nn.Module):
    """bilinear[d, e, k] = Σ_r in_factor[d, r] out_factor[r, e] context_factor[k, r], in place of the tensor.

    (D + E + K)·R parameters stand for D·E·K; every weight of a context is the shared one plus a matrix of rank R.

    Args:
        d_in, d_out, context_dim: D, E, K. rank: R.
        init: how the factors start, see `init_factors_`.
        device, dtype: of the parameters.

    Attributes:
        in_factor: [D, R]. context_factor: [K, R]. out_factor: [R, E].

    Raises:
        ValueError: a rank below 1, or an unknown init.

    Example:
        >>> factors = BilinearFactors(8, 6, 4, rank=2)
        >>> factors.tensor().shape
        torch.Size([8, 6, 4])
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_dim: int,
        rank: int,
        *,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"BilinearFactors: rank is {rank!r}; it must be a positive integer")
        self.rank, self.init = rank, init
        self.in_factor = nn.Parameter(torch.empty(d_in, rank, device=device, dtype=dtype))
        self.context_factor = nn.Parameter(torch.empty(context_dim, rank, device=device, dtype=dtype))
        self.out_factor = nn.Parameter(torch.empty(rank, d_out, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the factors again, as at construction."""
        init_factors_(*self.factors(), self.init)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(in_factor, context_factor, out_factor), the order of `ctxkern.factored_modulated_linear`."""
        return self.in_factor, self.context_factor, self.out_factor

    def tensor(self) -> torch.Tensor:
        """The tensor that the factors stand for, [D, E, K]; differentiable."""
        return torch.einsum("dr,kr,re->dek", *self.factors())

    def extra_repr(self) -> str:
        d_in, context_dim, d_out = self.in_factor.shape[0], self.context_factor.shape[0], self.out_factor.shape[1]
        return f"{d_in}, {d_out}, {context_dim}, rank={self.rank}"


def bilinear_parameter(
    d_in: int,
    d_out: int,
    context_dim: int,
    rank: int | None,
    init: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter | BilinearFactors:
    """What a layer of that rank keeps for its bilinear tensor: the whole, not yet drawn, for None."""
    if rank is None:
        return nn.Parameter(torch.empty(d_in, d_out, context_dim, device=device, dtype=dtype))
    return BilinearFactors(d_in, d_out, context_dim, rank, init=init, device=device, dtype=dtype)

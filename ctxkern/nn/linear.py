"""Linear layers whose weight depends on a context, an adapter or a second input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.functional import bilinear, factored_modulated_linear, lora_linear, modulated_linear
from ctxkern.serve.cache import Base, kept
from ctxkern.serve.int8 import Int8Bilinear, int8_modulated_linear

from .factors import BilinearFactors, bilinear_parameter
from .init import init_bilinear_


class ModulatedLinear(nn.Module):
    """y_b = x_b (weight + Σ_k bilinear[:, :, k] context[b, k]) + bias: `ctxkern.modulated_linear` as a module.

    Args:
        in_features: D, width of x.
        out_features: E, width of y.
        context_dim: K, width of a context.
        bias: whether there is a bias [E], which all contexts share.
        base: whether there is a shared weight [D, E]; without it the context makes the whole weight.
        rank: R, where `bilinear` is kept by CP factors of that rank: (D + E + K)·R parameters in place of D·E·K, and
            about the cost of a low-rank adapter. None: the whole tensor.
        init: how `bilinear` starts, see `init_bilinear_` and `init_factors_`.
        device, dtype: of the parameters.

    Attributes:
        weight: [D, E], used as x @ weight, or None. bilinear: [D, E, K], or a `BilinearFactors`. bias: [E] or None.
        workspace_bytes, backend: passed to `ctxkern.modulated_linear`; None, the defaults, may be set on a layer.

    Raises:
        ValueError: an unknown init, or a rank below 1.

    Example:
        >>> layer = ModulatedLinear(8, 6, context_dim=4)
        >>> layer(torch.randn(3, 5, 8), torch.randn(3, 4)).shape
        torch.Size([3, 5, 6])
    """

    bilinear: Any  # nn.Parameter, BilinearFactors or Int8Bilinear
    bilinear_names = ("bilinear",)
    weight_cache: Any = None
    workspace_bytes: int | None = None
    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_dim: int,
        bias: bool = True,
        *,
        base: bool = True,
        rank: int | None = None,
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.context_dim, self.init = in_features, out_features, context_dim, init
        shape = (in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if base else None
        self.bilinear = bilinear_parameter(*shape, context_dim, rank, init, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, context_dim: int, *, rank: int | None = None, init: str = "normal"
    ) -> ModulatedLinear:
        """A layer that starts near an nn.Linear: a copy of its weight and bias, and a bilinear part.

        Args:
            linear: the layer to copy; it stays as it is.
            context_dim: K, width of a context.
            rank: of CP factors in place of the whole tensor, as at construction.
            init: how `bilinear` starts, see `init_bilinear_`; with `normal` the layer starts near `linear`.

        Returns:
            The layer, with the device, dtype and requires_grad of the weight and bias of `linear`.

        Example:
            >>> layer = ModulatedLinear.from_linear(nn.Linear(8, 6), context_dim=4)
            >>> layer.weight.shape
            torch.Size([8, 6])
        """
        weight, bias = linear.weight, linear.bias
        new = cls(
            linear.in_features,
            linear.out_features,
            context_dim,
            bias is not None,
            rank=rank,
            init=init,
            device=weight.device,
            dtype=weight.dtype,
        )
        new.weight = nn.Parameter(weight.detach().mT.clone(memory_format=torch.contiguous_format), weight.requires_grad)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return new

    def reset_parameters(self) -> None:
        """Draws all parameters again, as at construction."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        if isinstance(self.bilinear, BilinearFactors):
            self.bilinear.reset_parameters()
        else:
            init_bilinear_(self.bilinear, self.init)

    def base_of(self, name: str) -> Base:
        """The shared weight of the bilinear tensor of that name."""
        return Base(self.weight, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, context_dim={self.context_dim}, bias={self.bias is not None}"

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        *,
        context_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer under its contexts.

        Args:
            x: [B, S, D], [B, D] (a token per sequence) or [B, ..., D]; packed [N, D] with `cu_seqlens`.
            context: [F, K], one row per sequence (F == B) or rows picked by `context_index`; or [B, ..., K], one per
                token.
            context_index, cu_seqlens: as in `ctxkern.modulated_linear`.

        Returns:
            x with E in place of D.

        Raises:
            TypeError, ValueError, RuntimeError: as in `ctxkern.modulated_linear`.
        """
        tokens = sequences(x, cu_seqlens)
        if isinstance(context, torch.Tensor) and context.dim() > 3:
            context = context.flatten(1, -2)
        if self.weight_cache is not None and self.backend is None:
            y = kept(self, "bilinear", tokens, context, context_index, self.bias, cu_seqlens=cu_seqlens)
            if y is not None:
                return shaped(y, x)
        spans = {"context_index": context_index, "cu_seqlens": cu_seqlens, "backend": self.backend}
        if isinstance(self.bilinear, BilinearFactors):
            factors = self.bilinear.factors()
            y = factored_modulated_linear(tokens, context, self.weight, *factors, self.bias, **spans)
        elif isinstance(self.bilinear, Int8Bilinear):
            y = int8_modulated_linear(tokens, context, self.weight, self.bilinear, self.bias, **spans)
        else:
            memory = self.workspace_bytes
            y = modulated_linear(
                tokens, context, self.weight, self.bilinear, self.bias, workspace_bytes=memory, **spans
            )
        return shaped(y, x)


class Bilinear(nn.Bilinear):
    """Drop-in for torch.nn.Bilinear: same constructor, initialisation and state_dict, by `ctxkern.bilinear`.

    Args:
        in1_features: D. in2_features: K. out_features: E. bias, device, dtype: as in torch.nn.Bilinear.

    Example:
        >>> layer = Bilinear(8, 4, 6)
        >>> layer(torch.randn(3, 5, 8), torch.randn(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def forward(self, input1: torch.Tensor, input2: torch.Tensor) -> torch.Tensor:
        """input1 [..., D] and input2 [..., K] → [..., E]; errors as in `ctxkern.bilinear`."""
        return bilinear(input1, input2, self.weight, self.bias)


class DynamicLoraLinear(nn.Linear):
    """nn.Linear with low-rank weights given at the call: y_b = x_b Wᵀ + bias + (alpha / r) (dropout(x_b) A_bᵀ) B_bᵀ.

    Args:
        in_features: D, width of x.
        out_features: E, width of y.
        bias, device, dtype: as in nn.Linear.
        alpha: numerator of the scale; None: r, a scale of 1.
        dropout: probability of dropping an entry of the adapter's input, in training only.

    Raises:
        ValueError: a dropout outside [0, 1).

    Example:
        >>> layer = DynamicLoraLinear(8, 6, alpha=4)
        >>> x, A, B = torch.randn(3, 5, 8), torch.randn(3, 2, 8), torch.randn(3, 6, 2)
        >>> layer(x, A, B).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if not 0 <= dropout < 1:
            raise ValueError(f"DynamicLoraLinear: dropout is {dropout!r}; it must be at least 0 and less than 1")
        self.alpha, self.dropout = alpha, dropout

    def forward(
        self,
        x: torch.Tensor,
        A: torch.Tensor | None = None,
        B: torch.Tensor | None = None,
        *,
        adapter_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer with an adapter per sequence; without A and B exactly the linear layer.

        Args:
            x: [B, S, D], [B, D] (a token per sequence) or [B, ..., D]; packed [N, D] with `cu_seqlens`.
            A: [b, r, D]. B: [b, E, r].
            adapter_index, cu_seqlens: as in `ctxkern.lora_linear`.

        Returns:
            x with E in place of D.

        Raises:
            TypeError, ValueError: A without B, B without A, or what `ctxkern.lora_linear` raises.
        """
        if A is None and B is None:
            return F.linear(x, self.weight, self.bias)
        if A is None or B is None:
            missing, given = ("A", "B") if A is None else ("B", "A")
            raise ValueError(f"DynamicLoraLinear: {missing} is None; it must be a tensor, as {given} is given")
        scale = 1.0 if self.alpha is None else self.alpha / max(A.shape[1], 1)
        y = lora_linear(
            sequences(x, cu_seqlens),
            self.weight,
            A,
            B,
            scale,
            self.bias,
            adapter_index=adapter_index,
            cu_seqlens=cu_seqlens,
            dropout=self.dropout if self.training else 0.0,
        )
        return shaped(y, x)


def sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """x in the shapes of the functions: [B, D] as [B, 1, D], [B, ..., D] as [B, S, D]; packed x as it is."""
    if isinstance(x, torch.Tensor) and cu_seqlens is None:
        if x.dim() == 2:
            return x[:, None]
        if x.dim() > 3:
            return x.flatten(1, -2)
    return x


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The result of `sequences(x)` in the shape of x."""
    return y if y.dim() == x.dim() else y.reshape(*x.shape[:-1], y.shape[-1])

"""Linear layers whose weight depends on a context, an adapter or a second input."""

import torch
import torch.nn.functional as F
from torch import nn

from ctxkern.functional import bilinear, lora_linear, modulated_linear

from .init import init_bilinear_


class ModulatedLinear(nn.Module):
    """y_b = x_b (weight + Σ_k bilinear[:, :, k] context[b, k]) + bias: `ctxkern.modulated_linear` as a module.

    Args:
        in_features: D. out_features: E. context_dim: K.
        bias: a bias [E], shared by all contexts. base: the shared weight [D, E]; without it the context makes all.
        init: how `bilinear` [D, E, K] starts, see `ctxkern.nn.init_bilinear_`.
    """

    workspace_bytes = None
    backend = None

    def __init__(
        self, in_features, out_features, context_dim, bias=True, *, base=True, init="normal", device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features, self.context_dim, self.init = in_features, out_features, context_dim, init
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **factory)) if base else None
        self.bilinear = nn.Parameter(torch.empty(in_features, out_features, context_dim, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear, context_dim, *, init="normal"):
        """A copy of an nn.Linear with a bilinear part beside; with `init="normal"` it starts near the layer."""
        weight = linear.weight
        new = cls(
            linear.in_features,
            linear.out_features,
            context_dim,
            linear.bias is not None,
            init=init,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            new.weight.copy_(weight.mT)
            if linear.bias is not None:
                new.bias.copy_(linear.bias)
        return new

    def reset_parameters(self):
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        init_bilinear_(self.bilinear, self.init)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, context_dim={self.context_dim}, bias={self.bias is not None}"

    def forward(self, x, context, *, context_index=None, cu_seqlens=None):
        """x [B, S, D] or packed [N, D] → [B, S, E] or [N, E]; arguments and errors as `ctxkern.modulated_linear`."""
        return modulated_linear(
            x,
            context,
            self.weight,
            self.bilinear,
            self.bias,
            context_index=context_index,
            cu_seqlens=cu_seqlens,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )


class Bilinear(nn.Bilinear):
    """Drop-in for torch.nn.Bilinear: same constructor, initialisation and state_dict, by `ctxkern.bilinear`."""

    def forward(self, input1, input2):
        return bilinear(input1, input2, self.weight, self.bias)


class DynamicLoraLinear(nn.Linear):
    """nn.Linear with low-rank weights given at the call: y_b = x_b Wᵀ + bias + (alpha / r) (dropout(x_b) A_bᵀ) B_bᵀ.

    Args:
        in_features: D. out_features: E. bias, device, dtype: as nn.Linear.
        alpha: scaling numerator; None: r, a scale of 1. dropout: of the adapter's input, in training only.
    """

    def __init__(self, in_features, out_features, bias=True, *, alpha=None, dropout=0.0, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}, takes a number from 0 up to 1")
        self.alpha, self.dropout = alpha, dropout

    def forward(self, x, A=None, B=None, *, adapter_index=None, cu_seqlens=None):
        """x [B, S, D] (or packed [N, D]), A [b, r, D], B [b, E, r]; without A exactly the linear layer.

        Raises ValueError where A comes without B or the batch does not match, as `ctxkern.lora_linear`.
        """
        if A is None and B is None:
            return F.linear(x, self.weight, self.bias)
        if A is None or B is None:
            raise ValueError(f"{'A' if A is None else 'B'} is None beside the other, takes both or neither")
        rank = A.shape[1]
        scale = 1.0 if self.alpha is None else self.alpha / max(rank, 1)
        indices = {"adapter_index": adapter_index, "cu_seqlens": cu_seqlens}
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout)
            return F.linear(x, self.weight, self.bias) + lora_linear(dropped, None, A, B, scale, **indices)
        return lora_linear(x, self.weight, A, B, scale, self.bias, **indices)

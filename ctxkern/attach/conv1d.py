"""The layers for transformers' Conv1D, a linear layer with weight [D, E]; imported where one is attached to."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .layers import AdapterLayer, ContextLayer


class _Turned:
    weight: Tensor

    @property
    def out_in(self) -> Tensor:
        """The weight as [E, D], a view."""
        return self.weight.mT


class ContextConv1D(_Turned, ContextLayer, Conv1D):  # type: ignore[misc]
    """A Conv1D with a weight for each context."""


class AdapterConv1D(_Turned, AdapterLayer, Conv1D):  # type: ignore[misc]
    """A Conv1D with a bank of adapters."""

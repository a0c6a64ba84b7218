"""AdamW over banks of adapters, each of which trains as it would alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxkern.ops import distributed


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW for parameters whose rows are adapters, [n, ...], as `attach_adapters` makes them.

    Each adapter has its own learning rate, count of steps, bias correction and largest gradient norm. One without a
    gradient in a step, as no sequence of the batch uses it, is left as it is: no decay, no moment, no step. So a mixed
    step on several adapters moves each as a step on it alone would. Banks that FSDP2 shards by rows are stepped where
    they lie: an adapter's rows of all banks are in one process, and its norm needs no message.

    Args:
        params: the banks, all with the same number of rows n.
        lr: learning rate, which schedulers change.
        lr_scales: [n] of each adapter over `lr`; may be assigned between steps.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        grad_clip: largest norm of the gradient of each adapter; None does not clip.

    Attributes:
        averaged: over how many adapters the loss was a mean; gradients are multiplied by it. 1 where it was a sum.

    Raises:
        TypeError: banks that are sharded over another dimension, or in several ways. ValueError: banks of different
        sizes, `lr_scales` that is not [n], a setting below 0.

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> attach_adapters(model, 3, 2, "0")
        ['0']
        >>> banks = [p for p in model.parameters() if p.requires_grad]
        >>> optimizer = AdapterAdamW(banks, lr=1e-3, lr_scales=[1.0, 0.5, 2.0], grad_clip=1.0)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        lr_scales: Sequence[float] | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
    ) -> None:
        banks = list(params)
        sizes = sorted({len(bank) for bank in banks})
        if len(sizes) != 1:
            raise ValueError(f"AdapterAdamW: params has banks of {sizes or 'no'} adapters; all must have as many")
        self._known: tuple[set[int], Tensor] | None = None
        self._rows(banks)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("grad_clip", grad_clip or 0.0)):
            if value < 0:
                raise ValueError(f"AdapterAdamW: {name} is {value}; it must be at least 0")
        (self.size,) = sizes
        self.averaged = 1
        self.lr_scales = [1.0] * self.size if lr_scales is None else lr_scales
        super().__init__(
            banks,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "grad_clip": grad_clip},
        )

    @property
    def lr_scales(self) -> Tensor:
        """[n] float64 on the CPU."""
        return self._scales

    @lr_scales.setter
    def lr_scales(self, values: Sequence[float] | Tensor) -> None:
        scales = torch.as_tensor(values, dtype=torch.float64).cpu()
        if scales.shape != (self.size,):
            raise ValueError(f"AdapterAdamW: lr_scales has shape {list(scales.shape)}; it must be [{self.size}]")
        self._scales = scales

    def _rows(self, banks: Sequence[Tensor]) -> Tensor | None:
        """The numbers of the adapters of which this process has the rows; None: all.

        Raises:
            TypeError: banks that are not sharded by rows.
        """
        if not distributed(banks):
            return None
        # a model may be sharded after its optimizer was made
        found = {id(bank) for bank in banks}
        if self._known is None or self._known[0] != found:
            self._known = found, _own_rows(banks)
        return self._known[1]

    def reset(self, adapter: int) -> None:
        """Forgets the steps and moments of an adapter, whose row is about to become another one."""
        own = self._rows(self.param_groups[0]["params"])
        rows = adapter if own is None else own == adapter
        for state in self.state.values():
            for value in state.values():
                _local(value)[rows] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each adapter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        found = [(p, _local(p.grad)) for p in group["params"] if p.grad is not None]
        # moments of halves are kept in float32
        found = [(p, grad.float() if grad.dtype.itemsize < 4 else grad) for p, grad in found]
        if not found:
            return loss
        norms = torch.stack([grad.flatten(1).square().sum(1) for _, grad in found]).sum(0).sqrt() * self.averaged
        factor = torch.full_like(norms, float(self.averaged))
        if group["grad_clip"] is not None:
            factor *= (group["grad_clip"] / (norms + 1e-6)).clamp(max=1.0)
        active = (norms > 0).to(norms)
        rows = self._rows(group["params"])
        scales = self.lr_scales if rows is None else self.lr_scales[rows]
        rate = scales.to(norms) * group["lr"] * active
        for bank, grad in found:
            self._update(group, bank, grad, factor, active, rate)
        return loss

    def _update(
        self, group: dict[str, Any], bank: Tensor, grad: Tensor, factor: Tensor, active: Tensor, rate: Tensor
    ) -> None:
        state = self.state[bank]
        if not state:
            # sharded as the bank is
            state["steps"] = torch.zeros_like(bank.flatten(1)[:, 0], dtype=active.dtype)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(bank, dtype=grad.dtype)
        steps, average, square = (_local(state[name]) for name in ("steps", "exp_avg", "exp_avg_sq"))
        rows = (len(grad), *[1] * (grad.dim() - 1))
        first, second = group["betas"]
        steps.add_(active)
        grad = grad * factor.view(rows)
        # a weight of 0 leaves the moments of an adapter without gradient as they are
        average.lerp_(grad, (active * (1 - first)).view(rows))
        square.lerp_(grad.square(), (active * (1 - second)).view(rows))
        # of steps that none has taken, 1
        counted = steps.clamp(min=1)
        scale = rate / (1 - first**counted)
        spread = (1 - second**counted).sqrt().view(rows)
        change = average / (square.sqrt() / spread + group["eps"]) * scale.view(rows)
        own = _local(bank)
        if group["weight_decay"]:
            change += own * (rate * group["weight_decay"]).view(rows)
        own.sub_(change.to(own.dtype))


def _local(t: Any) -> Tensor:
    """What this process has of a tensor."""
    return t.to_local() if distributed((t,)) else t


def _own_rows(banks: Sequence[Tensor]) -> Tensor:
    from .placed import rows_of

    ways = {(t.device_mesh, tuple(t.placements)) if distributed((t,)) else None for t in banks}
    rows = rows_of(banks[0]) if len(ways) == 1 else None
    if rows is None:
        found = [list(way[1]) if way else "whole" for way in ways]
        raise TypeError(
            f"AdapterAdamW: params has banks that are {' and '.join(map(str, found))}; all must be whole, as under "
            "DDP, or all sharded by rows, as FSDP2 does"
        )
    return rows

"""A frozen language model with a bank of adapters, as the training loop takes it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxkern
from ctxkern.attach.layers import AdapterLayer
from ctxkern.attach.targets import is_linear
from ctxkern.experiments.adapters.roster import Roster
from ctxkern.experiments.core.data.windows import IGNORE_INDEX
from ctxkern.experiments.core.seeding import generator
from ctxkern.ops import distributed


def attention_targets(model: nn.Module) -> list[str]:
    """The names of the linear layers within attention, as models of transformers call it.

    Raises:
        ValueError: there are none.
    """
    found = [name for name, module in model.named_modules() if is_linear(module) and "att" in name.rpartition(".")[0]]
    if not found:
        raise ValueError("targets is 'auto', and the model has no linear layer within attention; it must name layers")
    return found


class AdapterBank(nn.Module):
    """`lm` with `roster.slots` adapters. Its state is the bank and the roster, without the frozen model.

    Args:
        lm: a causal language model of transformers; attached to and frozen in place.
        roster: who has which row.
        rank, alpha, targets: as `ctxkern.attach_adapters` takes them.
    """

    def __init__(self, lm: nn.Module, roster: Roster, rank: int, alpha: float, targets: list[str]):
        super().__init__()
        self.names = ctxkern.attach_adapters(lm, roster.slots, rank, targets, alpha=alpha)
        self.lm, self.roster = lm, roster
        with torch.no_grad():
            for layer in self.layers:
                layer.lora_A.zero_()
        # of each row, whether a loss or gradient of it was not finite; no part of the state
        self.failed = torch.zeros(roster.slots, dtype=torch.bool, device=self.banks()[0].device)
        for bank in self.banks():
            bank.register_hook(self._finite)

    def _finite(self, grad: Tensor) -> Tensor:
        """A bank's gradient without that of rows where it is not finite."""
        fine = grad.flatten(1).isfinite().all(1)
        self.failed |= ~fine
        return torch.where(fine.view(-1, *[1] * (grad.dim() - 1)), grad, 0)

    def finite(self, losses: Tensor, adapter: Tensor) -> Tensor:
        """Losses [B] of rows of adapters [B], 0 where they are not finite."""
        fine = losses.isfinite()
        self.failed |= torch.zeros_like(self.failed, dtype=torch.int32).index_add_(0, adapter, (~fine).int()) > 0
        return torch.where(fine, losses, 0)

    @property
    def layers(self) -> list[AdapterLayer]:
        """The attached layers."""
        return [module for module in self.lm.modules() if isinstance(module, AdapterLayer)]

    def banks(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def begin(self, slot: int, name: str, seed: int) -> None:
        """A new adapter in a row: A by its name and the seed alone, B zero."""
        rng = generator(seed, "weights", name)
        for layer in self.layers:
            drawn = torch.empty(layer.lora_A.shape[1:])
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=rng)
            for bank, value in ((layer.lora_A, drawn), (layer.lora_B, torch.zeros(()))):
                own = _row(bank, slot)
                if own is not None:
                    own.copy_(value)

    def forward(self, tokens: Tensor, adapter: Tensor, keep: Tensor) -> Tensor:
        """Logits [B, s, V] at the positions `keep` [s] of tokens [B, S], row by row with the adapters [B]."""
        with ctxkern.use(self.lm, adapter_index=adapter):
            return self.lm(tokens, logits_to_keep=keep, use_cache=False).logits

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B]: the sum of each row's cross entropies over its labels; `model` is this one, as it is trained."""
        # only positions where a row has a label need logits
        keep = (batch["target"] != IGNORE_INDEX).any(0).nonzero().flatten()
        logits = model(batch["input"], batch["adapter"], keep).flatten(0, 1)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        target = batch["target"][:, keep]
        losses = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view_as(target).sum(1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The banks and the roster."""
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in names or name == "_extra_state"}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Read what `state_dict` gave."""
        whole = {**super().state_dict(), **state_dict}
        return super().load_state_dict(whole, strict, assign)

    def get_extra_state(self) -> dict[str, Any]:
        """The roster."""
        return self.roster.to_json()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Read the roster."""
        self.roster.update(state)


def _row(bank: Tensor, slot: int) -> Tensor | None:
    """A row of a bank, to write to; None where another process has it."""
    if not distributed((bank,)):
        return bank[slot]
    from ctxkern.attach.placed import local_row

    return local_row(bank, slot)

"""Whether tensors are what they were: the same objects, not replaced inside, not written to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Stamp:
    """Of tensors that count their versions, which those made under torch.inference_mode do not."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(t), *_state(t)) for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of the stamp, unchanged."""
        if len(tensors) != len(self._seen):
            return False
        return all(seen[0]() is t and seen[1:] == _state(t) for seen, t in zip(self._seen, tensors, strict=True))


def _state(t: Tensor) -> tuple[object, ...]:
    return t._version, t.data_ptr(), t.dtype, t.device

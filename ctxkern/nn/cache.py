"""`KVCache`: the keys and values of the tokens that an attention layer has already seen."""

from __future__ import annotations

import torch

# spare rows of a buffer that has to grow: at least these, and half of what it holds, so that appending is amortised
_SPARE = 32


class KVCache:
    """Keys and values of the tokens so far, one cache per attention layer.

    Under torch.no_grad or inference_mode, tokens are written into a buffer with spare room, so that a step of decoding
    copies only its own tokens. In grad mode they are concatenated, as autograd may need what earlier steps returned.

    Args:
        max_length: the most tokens it will hold; the buffer is then allocated once. None lets it grow.

    Attributes:
        k, v: views [B, H, T, head_dim] of the T tokens so far, None while it is empty. Assign both to keep other rows,
            as a beam search does: `cache.k, cache.v = cache.k[rows], cache.v[rows]`.

    Example:
        >>> layer, cache = ContextModulatedAttention(8, 4, n_heads=2, is_causal=True), KVCache()
        >>> context = torch.randn(3, 4)
        >>> prompt = layer(torch.randn(3, 5, 8), context, cache=cache)
        >>> token = layer(torch.randn(3, 1, 8), context, cache=cache)
        >>> len(cache), cache.k.shape
        (6, torch.Size([3, 2, 6, 4]))
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        # [B, H, capacity, head_dim], of which the first `_length` tokens are there
        self._k: torch.Tensor | None = None
        self._v: torch.Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __copy__(self) -> KVCache:
        # without the spare room, which belongs to one cache alone
        new = KVCache(self.max_length)
        new._k, new._v, new._length = self.k, self.v, self._length
        return new

    @property
    def k(self) -> torch.Tensor | None:
        return None if self._k is None else self._k[:, :, : self._length]

    @k.setter
    def k(self, k: torch.Tensor | None) -> None:
        self._k, self._length = k, 0 if k is None else k.shape[2]

    @property
    def v(self) -> torch.Tensor | None:
        return None if self._v is None else self._v[:, :, : self._length]

    @v.setter
    def v(self, v: torch.Tensor | None) -> None:
        self._v, self._length = v, 0 if v is None else v.shape[2]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the keys and values of new tokens and returns those of all tokens.

        Args:
            k: [B, H, S, head_dim]. v: as k.

        Returns:
            The keys and the values, [B, H, T + S, head_dim] each.

        Raises:
            ValueError: k or v does not fit what the cache holds, or there are more than `max_length` tokens.
        """
        total = self._length + k.shape[2]
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"KVCache.append: k brings {total} tokens; they must be at most max_length = {self.max_length}"
            )
        for name, new, buffer in (("k", k, self._k), ("v", v, self._v)):
            expected = k if buffer is None else buffer
            if (
                new.dim() != 4
                or new.shape[:2] != expected.shape[:2]
                or new.shape[2:] != (k.shape[2], expected.shape[3])
            ):
                takes = [*expected.shape[:2], k.shape[2], expected.shape[3]]
                raise ValueError(f"KVCache.append: {name} has shape {list(new.shape)}; it must be {takes}")
        k = self._k = _extended(self._k, self._length, k, self.max_length)
        v = self._v = _extended(self._v, self._length, v, self.max_length)
        self._length = total
        return k[:, :, :total], v[:, :, :total]


def _extended(buffer: torch.Tensor | None, length: int, new: torch.Tensor, max_length: int | None) -> torch.Tensor:
    """A buffer with `new` after the first `length` tokens of this one: the same one where there is room."""
    total = length + new.shape[2]
    if buffer is None:
        if max_length is None or torch.is_grad_enabled():
            return new
        past = new[:, :, :0]
    else:
        past = buffer[:, :, :length]
        if torch.is_grad_enabled():
            return torch.cat((past, new), 2)
        if total <= buffer.shape[2] and buffer.dtype is new.dtype and _writable(buffer):
            buffer[:, :, length:total] = new
            return buffer
    capacity = total + max(_SPARE, total // 2) if max_length is None else max_length
    grown = new.new_empty((*new.shape[:2], capacity, new.shape[3]), dtype=torch.promote_types(past.dtype, new.dtype))
    grown[:, :, :length] = past
    grown[:, :, length:total] = new
    return grown


def _writable(buffer: torch.Tensor) -> bool:
    """Whether torch allows to write into it here: not into what inference mode made, outside of that mode."""
    # the compiler traces neither question, and takes no such tensor
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not buffer.is_inference()

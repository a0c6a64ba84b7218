"""What a low-rank call does: which product runs the base, and the counts of base and update."""

from dataclasses import dataclass

from ctxkern.dtypes import name_of
from ctxkern.plan import compute_dtype, floor
from ctxkern.runtime import cpu

from .base import own_on_cpu, strips_of_weight


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """How a low-rank call runs. Counts are of what was asked for, forward or backward, with every rank at its largest.

    base: what computes x weightᵀ, or the gradient of x: a product of torch's library, or one of C++ where that is
    faster, either with the update, so that y or dx takes one pass, or by itself.
    flops, bytes: of base and update. linear_flops: of the base alone.
    floor_seconds: max(bytes / bandwidth, flops / peak) on the device, None where its rates are not known.
    """

    backend: str
    base: str
    backward: bool
    tokens: int
    adapters: int
    rank: int
    d_in: int
    d_out: int
    flops: int
    bytes: int
    linear_flops: int
    floor_seconds: float | None = None
    rates: str = ""

    def __str__(self):
        limit = "unknown here" if self.floor_seconds is None else f"{self.floor_seconds * 1e3:.3g} ms ({self.rates})"
        ratio = f" ({self.flops / self.linear_flops:.3g}× the base alone)" if self.linear_flops else ""
        return "\n".join(
            (
                f"low-rank {'backward' if self.backward else 'forward'}: update by kernels of {self.backend}",
                f"  base       {self.base}",
                f"  N={self.tokens} tokens, {self.adapters} adapters, R={self.rank}, D={self.d_in}, E={self.d_out}",
                f"  flops      {self.flops:.4g}{ratio}",
                f"  bytes      {self.bytes:.4g}",
                f"  floor      {limit}",
            )
        )


def _base(operands, options, backend, backward):
    x, weight, *_, bias = operands[:5]
    if weight is None:
        return "none"
    if backend == "cpu":
        columns, text = weight.shape[1 if backward else 0], f"a product of C++ in {name_of(x.dtype)}"
        own, along = own_on_cpu(x.shape[:-1].numel(), columns, x.dtype, weight.dtype)
        alone = options.dropout or not cpu.core().plain(operands)
        if along and not alone and cpu.core().lora_along(operands):
            return f"{text}, with the update"
        if own and (backward or bias is None or bias.dtype is x.dtype):
            return text
    compute = compute_dtype(x.device.type, x.dtype)
    library = "torch's product (cuBLAS)" if x.device.type == "cuda" else "torch's product"
    text = f"{library} in {name_of(compute)}"
    if weight.dtype is compute:
        return text
    count = len(strips_of_weight(weight, 0, compute, options.workspace_bytes))
    return f"{text}, weight cast from {name_of(weight.dtype)} in {count} strip{'s' if count > 1 else ''}"


def plan(operands, options, backend, backward):
    """The `LoraPlan` of a call; gradients are those of operands that require them, or of x, A and B where none does."""
    x, weight, A, B, bias = operands[:5]
    tokens, (adapters, rank, d_in), d_out = x.shape[:-1].numel(), A.shape, B.shape[1]
    size, y_size = x.element_size(), x.element_size() * tokens * d_out
    linear = 0 if weight is None else 2 * tokens * d_in * d_out
    moved = tokens * d_in * size + sum(t.nbytes for t in (weight, A, B) if t is not None)
    if not backward:
        base, update = linear, 2 * tokens * rank * (d_in + d_out)
        moved += y_size * (1 if weight is None and bias is None else 3)
    else:
        asked = [t is not None and t.requires_grad for t in (x, weight, A, B)]
        need_x, need_weight, need_a, need_b = asked if any(asked) else (True, False, True, True)
        base = linear * (need_x + need_weight)
        by_in = need_b + need_x + need_a
        by_out = (need_x or need_a) + need_b
        update = 2 * tokens * rank * (d_in * by_in + d_out * by_out)
        moved += y_size + tokens * d_in * size * (3 * need_x if linear else need_x)
        moved += sum(t.nbytes for t, need in ((weight, need_weight), (A, need_a), (B, need_b)) if need)
    seconds, rates = floor(x.device.type, x.dtype, base + update, moved)
    return LoraPlan(
        backend=backend,
        base=_base(operands, options, backend, backward),
        backward=backward,
        tokens=tokens,
        adapters=adapters,
        rank=rank,
        d_in=d_in,
        d_out=d_out,
        flops=base + update,
        bytes=moved,
        linear_flops=base,
        floor_seconds=seconds,
        rates=rates,
    )

"""Bilinear tensors in int8, for inference: a quarter of the memory of float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctxkern import arguments, checks
from ctxkern.ops import operator
from ctxkern.plan import DEFAULT_WORKSPACE
from ctxkern.runtime.rows import Bucket, Rows, group_rows

from .making import blocks, rows_of_a_block, wide_dtype

# values of a row of bilinear that are cast at a time where it is quantised
_CAST = 8 << 20


class Int8Bilinear(nn.Module):
    """bilinear[d, e, k] ≈ values[d, e, k] scales[d, e], in place of the tensor; for inference alone.

    A scale belongs to K values, so that no row, column or outlier costs others their precision: the error of a value
    is at most half its scale, 1 / 252 of the largest of its K values.

    Args:
        bilinear: [D, E, K], of floats; it is read by blocks and not kept.

    Attributes:
        values: [D, E, K] int8, from −127 to 127. scales: [D, E] bfloat16, whatever the module is cast to.

    Raises:
        TypeError: bilinear is no tensor of floats. ValueError: it has not three dimensions, or is not finite.

    Example:
        >>> bilinear = torch.randn(8, 6, 4)
        >>> quantised = Int8Bilinear(bilinear)
        >>> ((quantised.tensor() - bilinear).norm() / bilinear.norm() < 0.01).item()
        True
    """

    values: Tensor
    scales: Tensor

    def __init__(self, bilinear: Tensor) -> None:
        super().__init__()
        op = "Int8Bilinear"
        checks.tensor(op, "bilinear", bilinear, (3,), "[D, E, K]")
        checks.activation(op, "bilinear", bilinear)
        how = {"device": bilinear.device}
        self.register_buffer("values", torch.empty(bilinear.shape, dtype=torch.int8, **how))
        self.register_buffer("scales", torch.empty(bilinear.shape[:2], dtype=torch.bfloat16, **how))
        with torch.no_grad():
            self._fill(bilinear.detach())

    def _fill(self, bilinear: Tensor) -> None:
        d_in, d_out, context_dim = bilinear.shape
        step = max(_CAST // max(d_out * context_dim * 4, 1), 1)
        for start in range(0, d_in, step):
            rows = slice(start, start + step)
            block = bilinear[rows].to(wide_dtype(bilinear))
            largest = block.abs().amax(2) if context_dim else block.new_zeros(block.shape[:2])
            scales = _rounded_up(largest / 127)
            if not torch.isfinite(scales).all():
                raise ValueError("Int8Bilinear: bilinear has values that are not finite; it must have none")
            self.scales[rows] = scales
            # K zeros have a scale of zero
            steps = torch.where(scales > 0, scales, 1).to(block.dtype)
            self.values[rows] = (block / steps[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)

    def tensor(self) -> Tensor:
        """The tensor that it stands for, [D, E, K] float32."""
        return self.values.float() * self.scales.float()[:, :, None]

    @property
    def shape(self) -> torch.Size:
        """[D, E, K]"""
        return self.values.shape

    def _apply(self, fn: Any, *how: Any) -> Any:
        scales = self.scales
        super()._apply(fn, *how)
        if self.scales.dtype is not scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.shape))


def parts(bilinear: Any) -> tuple[Tensor, Tensor | None]:
    """(values [D, E, K], scales or None) of a bilinear tensor or an Int8Bilinear."""
    return (bilinear.values, bilinear.scales) if isinstance(bilinear, Int8Bilinear) else (bilinear, None)


@torch.no_grad()
def int8_weight(weight: Tensor | None, bilinear: Int8Bilinear, context: Tensor) -> Tensor:
    """weight + Σ_k bilinear[:, :, k] context[k], [D, E] in float32 or wider; weight: [D, E] or None."""
    values, scales = bilinear.values, bilinear.scales
    contexts = context.to(values.device, wide_dtype(weight, context))[None]
    made = contexts.new_empty(values.shape[:2])
    for rows, block in blocks(weight, values, scales, contexts):
        made[rows] = block[0]
    return made


def _rounded_up(t: Tensor) -> Tensor:
    """In bfloat16, at least t, which is not negative."""
    half = t.to(torch.bfloat16)
    above = torch.nextafter(half, half.new_full((), torch.inf))
    return torch.where(half.to(t.dtype) < t, above, half)


def quantize_bilinear(model: nn.Module) -> list[str]:
    """Turns the bilinear tensors of a model's layers into int8 with scales, in place, for inference.

    They then take 1 + 2 / K bytes a value where float32 takes 4; a call casts them by blocks of 1 MiB, never whole.
    Of gaussian tensors the bilinear part of a weight gets an error of 0.5 % (K = 16) to 0.6 % (K = 64), the shared
    weight none (docs/serving.md has more figures). Calls compute in float32, or float64, whatever the dtype of x.
    Layers with factors (`rank=`) stay as they are.

    Args:
        model: a module with layers of `attach_contexts`, ModulatedLinear or ContextModulatedAttention.

    Returns:
        The names of the layers, in the order of the model.

    Raises:
        TypeError: model is no module. ValueError: it has no layer with a bilinear tensor of floats, or one with values
        that are not finite; the model is then as it was. A quantised layer that is called where gradients are enabled
        and its x, context or a parameter requires one raises RuntimeError.

    Example:
        >>> layer = ModulatedLinear(8, 6, context_dim=4)
        >>> quantize_bilinear(layer)
        ['']
        >>> with torch.no_grad():
        ...     layer(torch.randn(3, 5, 8), torch.randn(3, 4)).shape
        torch.Size([3, 5, 6])
    """
    op = "quantize_bilinear"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    found = {}
    for name, module in model.named_modules():
        for attribute in getattr(module, "bilinear_names", ()):
            if isinstance(getattr(module, attribute), Tensor):
                found[name, attribute] = module
    if not found:
        raise ValueError(f"{op}: model has no layer with a bilinear tensor of floats; it must have one")
    # a tensor that several layers share is quantised once
    made: dict[int, Int8Bilinear] = {}
    for (_, attribute), module in found.items():
        bilinear = getattr(module, attribute)
        if id(bilinear) not in made:
            made[id(bilinear)] = Int8Bilinear(bilinear)
    for (_, attribute), module in found.items():
        new = made[id(getattr(module, attribute))]
        delattr(module, attribute)
        setattr(module, attribute, new)
    return list(dict.fromkeys(name for name, _ in found))


def int8_modulated_linear(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    bilinear: Int8Bilinear,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`ctxkern.modulated_linear` with an `Int8Bilinear`, in PyTorch's own products; not differentiable.

    Raises:
        RuntimeError: gradients are enabled and something requires one. ValueError: a named backend, but "portable".
        Otherwise as in `modulated_linear`.
    """
    op = "modulated_linear"
    if backend not in (None, "portable"):
        raise ValueError(f"{op}: backend is {backend!r} and bilinear is int8; it must be None or 'portable'")
    arguments.activations(op, x, context)
    values, scales = bilinear.values, bilinear.scales
    if torch.is_grad_enabled():
        given = {"x": x, "context": context, "weight": weight, "bias": bias}
        for name, t in given.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires a gradient and bilinear is int8; it must be called under torch.no_grad(), "
                    "as there is no training with int8"
                )
    x, (context, weight, bias) = checks.autocast(x, (context, weight, bias))
    arguments.contexts(op, x, context, context_index, cu_seqlens)
    checks.shape(op, "bilinear", values, (x.shape[-1], values.shape[1], context.shape[-1]), "[D, E, K]")
    if values.device != x.device:
        raise ValueError(f"{op}: bilinear is on {values.device}; it must be on the device of x, {x.device}")
    if weight is not None:
        checks.fits(op, "weight", weight, x, tuple(values.shape[:2]), "[D, E]")
    if bias is not None:
        checks.fits(op, "bias", bias, x, tuple(values.shape[1:2]), "[E]")
    return int8_forward(x, context, weight, values, scales, bias, context_index, cu_seqlens)


def _int8_fake(x, context, weight, values, *_):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], values.shape[1]))


@operator(
    "int8_forward(Tensor x, Tensor context, Tensor? weight, Tensor values, Tensor scales, Tensor? bias, "
    "Tensor? context_index, Tensor? cu_seqlens) -> Tensor",
    _int8_fake,
)
def int8_forward(x, context, weight, values, scales, bias, context_index, cu_seqlens):  # type: ignore[no-untyped-def]
    """y by blocks of rows of D, each with the weights of all contexts, or of as many as a block holds in a row."""
    if context.dim() == 3:
        return _per_token(x, context, weight, values, scales, bias)
    rows = group_rows(x, len(context), context_index, cu_seqlens)
    y = _projected(rows.gather(x), rows.pick(context), weight, values, scales, bias, rows)
    return rows.scatter(y.to(x.dtype), x)


def _per_token(
    x: Tensor, context: Tensor, weight: Tensor | None, values: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """As many tokens at a time as the workspace holds a row of their weights for."""
    d_out = values.shape[1]
    y = x.new_empty(*x.shape[:-1], d_out)
    step = max(DEFAULT_WORKSPACE // max(d_out * wide_dtype(x, context, weight).itemsize, 1), 1)
    each = (t.flatten(0, 1).split(step) for t in (y, x, context))
    for part, tokens, contexts in zip(*each, strict=True):
        rows = Rows([Bucket(0, len(tokens), 0, 1)], len(tokens))
        part.copy_(_projected(tokens, contexts, weight, values, scales, bias, rows))
    return y


@torch.no_grad()
def _projected(
    x: Tensor,
    contexts: Tensor,
    weight: Tensor | None,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: Rows,
) -> Tensor:
    """y [N, E] of grouped rows x [N, D] and contexts [U, K], in float32 or wider."""
    (_, d_out, context_dim), wide = values.shape, wide_dtype(x, contexts, weight)
    with torch.autocast(x.device.type, enabled=False):
        x, contexts = x.to(wide), contexts.to(wide)
        y = x.new_zeros(len(x), d_out) if bias is None else bias.to(wide).expand(len(x), -1).clone()
        if context_dim == 0:
            return y if weight is None else y.addmm_(x, weight.to(wide))
        if not x.numel() or not d_out:
            return y
        strips = blocks(weight, values, scales, contexts)
        if len(x) > rows.contexts * rows_of_a_block(values, contexts):
            strips = _joined(weight, values, scales, contexts)
        for at, weights in strips:
            if rows.spread is not None:
                weights = weights.index_select(0, rows.spread)
            for b in rows.buckets:
                span = slice(b.start, b.start + b.count * b.rows)
                shape = (b.count, b.rows, -1)
                y[span].view(shape).baddbmm_(x[span, at].reshape(shape), weights[b.first : b.first + b.count])
    return y


def _joined(weight: Tensor | None, values: Tensor, scales: Tensor, contexts: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks put together as far as the workspace goes: for many rows of x, which then read y less often."""
    d_in, d_out, _ = values.shape
    step = max(DEFAULT_WORKSPACE // (len(contexts) * d_out * contexts.dtype.itemsize), 1)
    for start in range(0, d_in, step):
        rows = slice(start, min(start + step, d_in))
        strip = contexts.new_empty(len(contexts), rows.stop - rows.start, d_out)
        for at, made in blocks(None if weight is None else weight[rows], values[rows], scales[rows], contexts):
            strip[:, at] = made
        yield rows, strip

"""The public functions: they check their arguments and call the operators.

Symbols: B sequences of S tokens, N tokens in all, D = d_in, E = d_out, K = context_dim, F rows in the context table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments, checks, ops
from .factored.operands import Operands as FactoredOperands
from .factored.ops import factored
from .lora.operands import Operands as LoraOperands
from .lora.operands import Options as LoraOptions
from .lora.ops import lora
from .lora.plan import LoraPlan
from .lora.plan import plan as lora_plan
from .modulated.operands import Operands
from .modulated.ops import modulated, with_memory
from .plan import DEFAULT_WORKSPACE, Plan, default_workspace
from .registry import implementation, resolve


def modulated_linear(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    bilinear: Tensor,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a weight for each context: y_b = x_b (weight + Σ_k bilinear[:, :, k] context[b, k]) + bias.

    The weight of a context is never held whole; sequences that share a context row share the work of building its
    weight.

    Args:
        x: [B, S, D], or packed [N, D] with `cu_seqlens`. float32, bfloat16, float16 or float64.
        context: [F, K], or [B, S, K], a context per token.
        weight: [D, E] (y = x @ weight) or None.
        bilinear: [D, E, K], any strides; never copied.
        bias: [E] or None. Each parameter and the context have the dtype of x, or a half next to float32 in either
            place: they are read as they are.
        context_index: [B] int64, the row of `context` of each sequence; None: F == B, in order.
        cu_seqlens: [B + 1] int32, the bounds of the packed sequences, from 0 to N; empty sequences are allowed.
        workspace_bytes: temporary memory beyond O(N·(D + E)), at least one row or column of one weight; by default
            32 MiB, on a GPU 128 MiB.
        backend: None for the best one there, or a name of `ctxkern.backends()`, which then runs or raises.

    Returns:
        [B, S, E] or [N, E] in the dtype of x (that of autocast where it is on).

    Differentiable in x, context, weight, bilinear and bias, twice through the reference; saves its inputs only. Same
    inputs give the same bits.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, device or index that does not fit.
        RuntimeError: a named backend that cannot run here.

    Example:
        >>> x, table = torch.randn(4, 32, 64), torch.randn(3, 16)  # 4 sequences from 3 files
        >>> weight, bilinear = torch.randn(64, 64), torch.randn(64, 64, 16)
        >>> y = ctxkern.modulated_linear(x, table, weight, bilinear, context_index=torch.tensor([0, 2, 2, 1]))
        >>> y.shape
        torch.Size([4, 32, 64])

    Source: Jayakumar et al., Multiplicative Interactions and Where to Find Them (2020).
    """
    op = "modulated_linear"
    seen = arguments.fit(x, context, weight, bilinear, bias, context_index, cu_seqlens)
    if seen:
        backend = resolve(backend, x.device, x.dtype, "modulated")
    else:
        arguments.activations(op, x, context)
        x, (context, weight, bilinear, bias) = checks.autocast(x, (context, weight, bilinear, bias))
        arguments.contexts(op, x, context, context_index, cu_seqlens)
        arguments.projection(op, x, context, weight, bilinear, bias)
        backend = arguments.backend_of(backend, x)
    if workspace_bytes is None:
        workspace_bytes = default_workspace(x.device.type)
    else:
        workspace_bytes = checks.workspace(op, workspace_bytes, x)
    operands = Operands(x, context, (weight,), (bilinear,), (bias,), context_index, cu_seqlens)
    return modulated(operands, workspace_bytes, backend, seen)[0]


def modulated_qkv(
    x: Tensor,
    context: Tensor,
    weights: Sequence[Tensor | None] | None,
    bilinears: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one x in one call: three `modulated_linear` that read x and group it by context once.

    Args:
        weights: three [D, E_i] or None each, or None for none at all. Widths may differ (grouped-query attention).
        bilinears: three [D, E_i, K].
        biases: three [E_i] or None each, or None.
        The others as in `modulated_linear`.

    Returns:
        (q, k, v), each [B, S, E_i] or [N, E_i]. Differentiability, dtypes and errors as in `modulated_linear`.

    Example:
        >>> x, context = torch.randn(2, 8, 64), torch.randn(2, 16)
        >>> bilinears = [torch.randn(64, width, 16) for width in (64, 32, 32)]
        >>> q, k, v = ctxkern.modulated_qkv(x, context, None, bilinears)
    """
    op = "modulated_qkv"
    arguments.activations(op, x, context)
    weights = checks.projections(op, "weights", weights, 3, optional=True)
    bilinears = checks.projections(op, "bilinears", bilinears, 3, optional=False)
    biases = checks.projections(op, "biases", biases, 3, optional=True)
    for i, t in enumerate(bilinears):
        checks.tensor(op, f"bilinears[{i}]", t, (3,), "[D, E, K]")
    x, (context, *each) = checks.autocast(x, (context, *weights, *bilinears, *biases))
    weights, bilinears, biases = each[:3], each[3:6], each[6:]
    arguments.contexts(op, x, context, context_index, cu_seqlens)
    for i in range(3):
        names = f"weights[{i}]", f"bilinears[{i}]", f"biases[{i}]"
        arguments.projection(op, x, context, weights[i], bilinears[i], biases[i], names)
    workspace_bytes = checks.workspace(op, workspace_bytes, x)
    backend = arguments.backend_of(backend, x)
    operands = Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    q, k, v = modulated(operands, workspace_bytes, backend)
    return q, k, v


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Drop-in for `torch.nn.functional.bilinear`:

    y[..., o] = Σ_ij input1[..., i] weight[o, i, j] input2[..., j] + bias[o]

    The same map as `modulated_linear` with a context (input2) per row.

    Args:
        input1: [..., D]. input2: [..., K], the same leading dimensions, none included. weight: [E, D, K].
        bias: [E] or None.

    Returns:
        [..., E] in the dtype of input1; autocast promotes to the widest dtype given and casts nothing to its own, as it
        does for torch's function. Differentiable in all, twice through the reference.

    Raises:
        TypeError, ValueError: as in `modulated_linear`.

    Example:
        >>> ctxkern.bilinear(torch.randn(5, 64), torch.randn(5, 16), torch.randn(32, 64, 16)).shape
        torch.Size([5, 32])
    """
    op = "bilinear"
    for name, t, takes in (("input1", input1, "[..., D]"), ("input2", input2, "[..., K]")):
        checks.tensor(op, name, t, range(1, 65), takes)
        checks.activation(op, name, t)
    checks.tensor(op, "weight", weight, (3,), "[E, D, K]")
    if checks.autocast_enabled(input1):
        input1 = input1.to(torch.promote_types(torch.promote_types(input1.dtype, input2.dtype), weight.dtype))
    if input1.shape[:-1] != input2.shape[:-1]:
        raise ValueError(
            f"{op}: input2 has leading dimensions {list(input2.shape[:-1])}; they must be those of input1, "
            f"{list(input1.shape[:-1])}"
        )
    checks.parameter(op, "input2", input2, input1)
    checks.parameter(op, "weight", weight, input1)
    d_in, context_dim = input1.shape[-1], input2.shape[-1]
    checks.shape(op, "weight", weight, (weight.shape[0], d_in, context_dim), "[E, D, K]")
    if bias is not None:
        checks.fits(op, "bias", bias, input1, (weight.shape[0],), "[E]")
    tokens = input1.shape[:-1].numel()
    x, context = input1.reshape(1, tokens, d_in), input2.reshape(1, tokens, context_dim)
    backend = arguments.backend_of(None, x)
    operands = Operands(x, context, (None,), (weight.permute(1, 0, 2),), (bias,))
    (y,) = modulated(operands, default_workspace(x.device.type), backend)
    return y.view(*input1.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with low-rank weights for each sequence: y_b = x_b weightᵀ + scale (x_b A_bᵀ) B_bᵀ + bias.

    Args:
        x: [B, S, D], or packed [N, D] with `cu_seqlens`.
        weight: [E, D], as in nn.Linear, or None. A: [b, r, D]. B: [b, E, r], as in PEFT. bias: [E] or None.
        scale: a number, usually alpha / r, or [b] float32, one per adapter; it has no gradient.
        adapter_index: [B] int64 rows of A and B, −1 for a sequence without an adapter; None: b == B, in order.
        cu_seqlens, backend: as in `modulated_linear`.
        ranks: [b] int64, the rank of each adapter, at most r: the first rows of A and columns of B count. None: r.
        dropout: from 0 to 1, the share of x that A does not see. The others are scaled up, as in nn.Dropout.
        seed: an int, or an int64 tensor with one element, from which the mask is made, in the backward too. None: drawn
            from torch's generator.

    Returns:
        [B, S, E] or [N, E] in the dtype of x. Differentiable in x, weight, A, B and bias, twice through the reference;
        saves its inputs only. Same inputs and seed give the same bits; on the CPU a sequence alone may be rounded
        otherwise than among others, as the product with the base weight is chosen by the number of rows.

    Raises:
        TypeError, ValueError, RuntimeError: as in `modulated_linear`.

    Example:
        >>> x, A, B = torch.randn(4, 32, 64), torch.randn(2, 8, 64), torch.randn(2, 96, 8)  # two adapters of rank 8
        >>> weight = torch.randn(96, 64)
        >>> y = ctxkern.lora_linear(x, weight, A, B, scale=2.0, adapter_index=torch.tensor([0, 1, 1, 0]))

    Source: Hu et al., LoRA (2021).
    """
    if arguments.fit_low_rank(scale, dropout, x, weight, A, B, bias, adapter_index, cu_seqlens, ranks):
        options = LoraOptions(DEFAULT_WORKSPACE, resolve(backend, x.device, x.dtype, "lora"), float(scale), 0.0)
        return lora(LoraOperands(x, weight, A, B, bias, None, ranks, None, adapter_index, cu_seqlens), options, True)
    given = (x, weight, A, B, scale, bias, adapter_index, cu_seqlens, ranks, dropout, seed)
    return lora(*arguments.low_rank("lora_linear", backend, *given))


def factored_modulated_linear(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    in_factor: Tensor,
    context_factor: Tensor,
    out_factor: Tensor,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`modulated_linear` with `bilinear` in CP form.

    y = x weight + ((x in_factor) ∘ (context context_factor)) out_factor + bias

    It stands for bilinear[d, e, k] = Σ_r in_factor[d, r] out_factor[r, e] context_factor[k, r], with (D + E + K)·R
    parameters in place of D·E·K.

    Args:
        in_factor: [D, R]. context_factor: [K, R]. out_factor: [R, E]. The others as in `modulated_linear`.

    Returns:
        [B, S, E] or [N, E] in the dtype of x. Differentiable in all but indices, twice through the reference;
        temporaries are O(N·R).

    Raises:
        TypeError, ValueError, RuntimeError: as in `modulated_linear`.

    Example:
        >>> x, context = torch.randn(2, 8, 64), torch.randn(2, 16)
        >>> factors = torch.randn(64, 4), torch.randn(16, 4), torch.randn(4, 96)
        >>> y = ctxkern.factored_modulated_linear(x, context, None, *factors)

    Source: Kolda and Bader, Tensor Decompositions and Applications (2009), section 3.
    """
    given = (x, context, weight, in_factor, context_factor, out_factor, bias, context_index, cu_seqlens)
    seen = arguments.fit_factored(*given)
    if seen:
        backend = resolve(backend, x.device, x.dtype, "factored")
    else:
        given = (*arguments.factored("factored_modulated_linear", *given), context_index, cu_seqlens)
        backend = arguments.backend_of(backend, given[0], "factored")
    operands = FactoredOperands(*given)
    return factored(operands, ops.Options(DEFAULT_WORKSPACE, backend), seen or arguments.seen(operands))


def explain(
    x: Tensor,
    context: Tensor,
    weight: Tensor | None,
    bilinear: Tensor,
    bias: Tensor | None = None,
    *,
    context_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    backward: bool = False,
) -> Plan:
    """The `Plan` by which `modulated_linear` would run these arguments (or their backward): strategy, backend, flops,
    bytes, workspace_bytes, and the floor. `print` it. Computes nothing; fake tensors and those on the meta device will
    do: where the values of an index cannot be read, as many contexts differ as can.

    Raises what `modulated_linear` raises.

    Example:
        >>> shapes = (32, 128, 512), (32, 64), (512, 512), (512, 512, 64)
        >>> print(ctxkern.explain(*(torch.empty(shape) for shape in shapes)))
    """
    op = "explain"
    arguments.activations(op, x, context)
    x, (context, weight, bilinear, bias) = checks.autocast(x, (context, weight, bilinear, bias))
    arguments.contexts(op, x, context, context_index, cu_seqlens)
    arguments.projection(op, x, context, weight, bilinear, bias)
    workspace_bytes = checks.workspace(op, workspace_bytes, x)
    backend = arguments.backend_of(backend, x)
    operands = Operands(x, context, (weight,), (bilinear,), (bias,), context_index, cu_seqlens)
    return implementation("modulated", backend, x).plan(with_memory(operands), workspace_bytes, backward)


def explain_lora(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ranks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    backward: bool = False,
) -> LoraPlan:
    """The `LoraPlan` by which `lora_linear` would run these arguments (or their backward): what computes the base
    product, the backend of the update, flops, bytes and the floor. `print` it. Computes nothing; fake tensors and
    those on the meta device will do. Of a backward, gradients of what requires them count, or of x, A and B.

    Raises what `lora_linear` raises.

    Example:
        >>> shapes = (32, 128, 1024), (1024, 1024), (32, 16, 1024), (32, 1024, 16)
        >>> print(ctxkern.explain_lora(*(torch.empty(shape) for shape in shapes), backward=True))
    """
    # any seed: none is drawn
    given = (x, weight, A, B, scale, bias, adapter_index, cu_seqlens, ranks, dropout, 0 if seed is None else seed)
    operands, options = arguments.low_rank("explain_lora", backend, *given)
    return lora_plan(operands, options, options.backend or "portable", backward)

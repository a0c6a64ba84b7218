"""The public functions: they check their arguments, pick a backend and call the operators.

Symbols: B sequences of S tokens, N tokens in all, D = d_in, E = d_out, K = context_dim, F rows in the context table.
"""

import torch

from . import checks, ops
from .lora.operands import Operands as LoraOperands
from .modulated.operands import Operands
from .plan import DEFAULT_WORKSPACE
from .registry import implementation, resolve


def modulated_linear(
    x,
    context,
    weight,
    bilinear,
    bias=None,
    *,
    context_index=None,
    cu_seqlens=None,
    workspace_bytes=None,
    backend=None,
):
    """A linear layer with a weight for each context: y_b = x_b (weight + Σ_k bilinear[:, :, k] context[b, k]) + bias.

    The weight of a context is never held whole; sequences of the same row of `context` share its making.

    Args:
        x: [B, S, D], or packed [N, D] with `cu_seqlens`. float32, bfloat16, float16 or float64.
        context: [F, K], or [B, S, K], a context per token.
        weight: [D, E] (y = x @ weight) or None.
        bilinear: [D, E, K], any strides; never copied.
        bias: [E] or None. Parameters and context have the dtype of x, or float32 beside a half.
        context_index: [B] int64, the row of `context` of each sequence; None: F == B, in order.
        cu_seqlens: [B + 1] int32, the bounds of the packed sequences, from 0 to N; empty sequences are allowed.
        workspace_bytes: temporary memory beyond O(N·(D + E)); 32 MiB by default, at least one row or
            column of one weight.
        backend: None for the best one there, or a name of `ctxkern.backends()`, which then runs or raises.

    Returns:
        [B, S, E] or [N, E] in the dtype of x (that of autocast where it is on).

    Differentiable in x, context, weight, bilinear and bias, twice through the reference; saves its inputs only. Same
    inputs give the same bits.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, device or index that does not fit.
        RuntimeError: a named backend that cannot run here.

    Source: Jayakumar et al., Multiplicative Interactions and Where to Find Them (2020).
    """
    op = "modulated_linear"
    x, context = _inputs(op, x, context, context_index, cu_seqlens)
    _projection(op, x, context, weight, bilinear, bias, "")
    workspace_bytes = checks.workspace(op, workspace_bytes)
    backend = _backend(backend, x, context, context_index, cu_seqlens)
    operands = Operands(x, context, (weight,), (bilinear,), (bias,), context_index, cu_seqlens)
    return ops.modulated(operands, workspace_bytes, backend)[0]


def modulated_qkv(
    x,
    context,
    weights,
    bilinears,
    biases=None,
    *,
    context_index=None,
    cu_seqlens=None,
    workspace_bytes=None,
    backend=None,
):
    """q, k and v of one x in one call: three `modulated_linear` that share its reading and its grouping by context.

    Args:
        weights: three [D, E_i] or None each, or None for none at all. Widths may differ (grouped-query attention).
        bilinears: three [D, E_i, K].
        biases: three [E_i] or None each, or None.
        The others as in `modulated_linear`.

    Returns:
        (q, k, v), each [B, S, E_i] or [N, E_i]. Differentiability, dtypes and errors as in `modulated_linear`.
    """
    op = "modulated_qkv"
    x, context = _inputs(op, x, context, context_index, cu_seqlens)
    weights = checks.projections(op, "weights", weights, 3, optional=True)
    bilinears = checks.projections(op, "bilinears", bilinears, 3, optional=False)
    biases = checks.projections(op, "biases", biases, 3, optional=True)
    for i in range(3):
        _projection(op, x, context, weights[i], bilinears[i], biases[i], f"s[{i}]")
    workspace_bytes = checks.workspace(op, workspace_bytes)
    backend = _backend(backend, x, context, context_index, cu_seqlens)
    operands = Operands(x, context, weights, bilinears, biases, context_index, cu_seqlens)
    return ops.modulated(operands, workspace_bytes, backend)


def bilinear(input1, input2, weight, bias=None):
    """Drop-in for `torch.nn.functional.bilinear`:

    y[..., o] = Σ_ij input1[..., i] weight[o, i, j] input2[..., j] + bias[o]

    The same map as `modulated_linear` with a context (input2) per row.

    Args:
        input1: [..., D]. input2: [..., K], the same leading dimensions, none included. weight: [E, D, K].
        bias: [E] or None.

    Returns:
        [..., E]. Differentiable in all, twice through the reference.

    Raises:
        TypeError, ValueError: as in `modulated_linear`.
    """
    op = "bilinear"
    for name, t, takes in (("input1", input1, "[..., D]"), ("input2", input2, "[..., K]")):
        checks.tensor(op, name, t, _Any, takes)
        checks.activation(op, name, t)
        if t.dim() == 0:
            raise ValueError(f"{op}: {name} has shape [], takes {takes}")
    input1, input2 = checks.autocast(input1, input2)
    if input1.shape[:-1] != input2.shape[:-1]:
        raise ValueError(
            f"{op}: input2 has leading dimensions {list(input2.shape[:-1])}, takes those of input1, "
            f"{list(input1.shape[:-1])}"
        )
    checks.parameter(op, "input2", input2, input1)
    checks.tensor(op, "weight", weight, (3,), "[E, D, K]")
    checks.parameter(op, "weight", weight, input1)
    d_in, context_dim = input1.shape[-1], input2.shape[-1]
    checks.shape(op, "weight", weight, (weight.shape[0], d_in, context_dim), "[E, D, K]")
    checks.bias(op, "bias", bias, input1, weight.shape[0])
    tokens = input1.shape[:-1].numel()
    x, context = input1.reshape(1, tokens, d_in), input2.reshape(1, tokens, context_dim)
    backend = _backend(None, x, context, None, None)
    operands = Operands(x, context, (None,), (weight.permute(1, 0, 2),), (bias,))
    (y,) = ops.modulated(operands, DEFAULT_WORKSPACE, backend)
    return y.view(*input1.shape[:-1], weight.shape[0])


def lora_linear(x, weight, A, B, scale=1.0, bias=None, *, adapter_index=None, cu_seqlens=None, backend=None):
    """A linear layer with low-rank weights for each sequence: y_b = x_b weightᵀ + scale (x_b A_bᵀ) B_bᵀ + bias.

    Args:
        x: [B, S, D], or packed [N, D] with `cu_seqlens`.
        weight: [E, D], as in nn.Linear, or None. A: [b, r, D]. B: [b, E, r], as in PEFT. bias: [E] or None.
        scale: a number, usually alpha / r.
        adapter_index: [B] int64 rows of A and B; None: b == B, in order.
        cu_seqlens, backend: as in `modulated_linear`.

    Returns:
        [B, S, E] or [N, E] in the dtype of x. Differentiable in x, weight, A, B and bias; saves its inputs only.

    Raises:
        TypeError, ValueError, RuntimeError: as in `modulated_linear`.

    Source: Hu et al., LoRA (2021).
    """
    op = "lora_linear"
    checks.tensor(op, "x", x, (2, 3), "[B, S, D] or packed [N, D]")
    checks.activation(op, "x", x)
    (x,) = checks.autocast(x)
    for name, t, takes in (("A", A, "[b, r, D]"), ("B", B, "[b, E, r]")):
        checks.tensor(op, name, t, (3,), takes)
        checks.parameter(op, name, t, x)
    d_out = B.shape[1]
    if weight is not None:
        checks.tensor(op, "weight", weight, (2,), "[E, D]")
        checks.parameter(op, "weight", weight, x)
        checks.shape(op, "weight", weight, (weight.shape[0], x.shape[-1]), "[E, D]")
        d_out = weight.shape[0]
    checks.shape(op, "A", A, (*A.shape[:2], x.shape[-1]), "[b, r, D]")
    checks.shape(op, "B", B, (A.shape[0], d_out, A.shape[1]), "[b, E, r]")
    checks.bias(op, "bias", bias, x, d_out)
    checks.sequences(op, x, A, "A", adapter_index, "adapter_index", cu_seqlens)
    _number(op, "scale", scale)
    backend = _backend(backend, x, A, adapter_index, cu_seqlens, "adapter_index", "lora")
    operands = LoraOperands(x, weight, A, B, bias, adapter_index, cu_seqlens)
    return ops.lora(operands, float(scale), DEFAULT_WORKSPACE, backend)


def factored_modulated_linear(
    x,
    context,
    weight,
    in_factor,
    context_factor,
    out_factor,
    bias=None,
    *,
    context_index=None,
    cu_seqlens=None,
):
    """`modulated_linear` with `bilinear` in CP form.

    y = x weight + ((x in_factor) ∘ (context context_factor)) out_factor + bias

    It stands for bilinear[d, e, k] = Σ_r in_factor[d, r] out_factor[r, e] context_factor[k, r], with (D + E + K)·R
    parameters in place of D·E·K.

    Args:
        in_factor: [D, R]. context_factor: [K, R]. out_factor: [R, E]. The others as in `modulated_linear`.

    Returns:
        [B, S, E] or [N, E] in the dtype of x. Plain differentiable PyTorch; temporaries are O(N·(R + E)).

    Raises:
        TypeError, ValueError: as in `modulated_linear`.

    Source: Kolda and Bader, Tensor Decompositions and Applications (2009), section 3.
    """
    op = "factored_modulated_linear"
    x, context = _inputs(op, x, context, context_index, cu_seqlens)
    factors = (("in_factor", in_factor, "[D, R]"), ("context_factor", context_factor, "[K, R]"))
    for name, t, takes in (*factors, ("out_factor", out_factor, "[R, E]")):
        checks.tensor(op, name, t, (2,), takes)
        checks.parameter(op, name, t, x)
    rank, d_out = out_factor.shape
    checks.shape(op, "in_factor", in_factor, (x.shape[-1], rank), "[D, R]")
    checks.shape(op, "context_factor", context_factor, (context.shape[-1], rank), "[K, R]")
    if weight is not None:
        checks.tensor(op, "weight", weight, (2,), "[D, E]")
        checks.parameter(op, "weight", weight, x)
        checks.shape(op, "weight", weight, (x.shape[-1], d_out), "[D, E]")
    checks.bias(op, "bias", bias, x, d_out)
    _values(x, context, context_index, cu_seqlens, "context_index")
    wide = torch.promote_types(context_factor.dtype, context.dtype)
    # picked in float32, in which the gradients of one context's tokens then add up
    gate = (context.to(wide) @ context_factor.to(wide)).to(torch.promote_types(x.dtype, torch.float32))
    if context.dim() == 2:
        gate = gate if context_index is None else gate[context_index]
        if cu_seqlens is None:
            gate = gate[:, None]
        else:
            token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
            gate = gate[torch.bucketize(token, cu_seqlens[1:], right=True)]
    y = ((x @ in_factor.to(x.dtype)) * gate.to(x.dtype)) @ out_factor.to(x.dtype)
    y = y if weight is None else y + x @ weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def explain(
    x,
    context,
    weight,
    bilinear,
    bias=None,
    *,
    context_index=None,
    cu_seqlens=None,
    workspace_bytes=None,
    backend=None,
    backward=False,
):
    """The `Plan` by which `modulated_linear` would run these arguments (or their backward): strategy, backend, flops,
    bytes, workspace_bytes, and the floor. `print` it. Computes nothing; tensors on the meta device will do.

    Raises what `modulated_linear` raises.
    """
    op = "explain"
    x, context = _inputs(op, x, context, context_index, cu_seqlens)
    _projection(op, x, context, weight, bilinear, bias, "")
    workspace_bytes = checks.workspace(op, workspace_bytes)
    backend = _backend(backend, x, context, context_index, cu_seqlens)
    operands = Operands(x, context, (weight,), (bilinear,), (bias,), context_index, cu_seqlens)
    planned = implementation("modulated", backend, x)
    return planned.plan(operands, workspace_bytes, backward)


_Any = range(65)


def _inputs(op, x, context, context_index, cu_seqlens):
    """x and context checked, under autocast in its dtype."""
    checks.tensor(op, "x", x, (2, 3), "[B, S, D] or packed [N, D]")
    checks.activation(op, "x", x)
    checks.tensor(op, "context", context, (2, 3), "[F, K] or [B, S, K]")
    (x,) = checks.autocast(x)
    checks.parameter(op, "context", context, x)
    if context.dim() == 2:
        checks.sequences(op, x, context, "context", context_index, "context_index", cu_seqlens)
        return x, context
    for name, t in (("context_index", context_index), ("cu_seqlens", cu_seqlens)):
        if t is not None:
            raise ValueError(f"{op}: {name} beside a context per token, {list(context.shape)}: takes None")
    if x.dim() == 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, takes [B, S, D] beside a context per token [B, S, K]")
    checks.shape(op, "context", context, (*x.shape[:2], context.shape[2]), "[B, S, K]")
    return x, context


def _projection(op, x, context, weight, bilinear, bias, entry):
    checks.tensor(op, "bilinear" + entry, bilinear, (3,), "[D, E, K]")
    checks.parameter(op, "bilinear" + entry, bilinear, x)
    d_in, d_out = x.shape[-1], bilinear.shape[1]
    checks.shape(op, "bilinear" + entry, bilinear, (d_in, d_out, context.shape[-1]), "[D, E, K]")
    if weight is not None:
        checks.tensor(op, "weight" + entry, weight, (2,), "[D, E]")
        checks.parameter(op, "weight" + entry, weight, x)
        checks.shape(op, "weight" + entry, weight, (d_in, d_out), "[D, E]")
    if bias is not None:
        checks.bias(op, "bias" + entry.replace("s[", "es["), bias, x, d_out)


def _number(op, name, value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} is {value!r}, takes a number")


def _backend(name, x, table, index, cu_seqlens, what="context_index", family="modulated"):
    """The backend that runs; the reference, which has no operator of its own, gets its values checked here."""
    if not torch.compiler.is_compiling():
        name = resolve(name, x.device, x.dtype, family)
        if name == "reference" or ops.transformed():
            _values(x, table, index, cu_seqlens, what)
    return name


def _values(x, table, index, cu_seqlens, what):
    """The values of indices, on the CPU and outside of a compiler; elsewhere torch's own indexing checks them."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    index, cu_seqlens = ops.readable(index), ops.readable(cu_seqlens)
    if index is not None:
        checks.check_index(index, table.shape[0], what)
    if cu_seqlens is not None:
        checks.check_bounds(cu_seqlens, x.shape[0])

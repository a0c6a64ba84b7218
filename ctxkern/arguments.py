"""What the public functions check of their arguments; symbols as there."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import checks
from .lora.operands import Operands, Options
from .plan import DEFAULT_WORKSPACE
from .registry import resolve
from .runtime import cpu


def fit(*arguments):
    """Whether a quick look shows that nothing sees or changes a call of `modulated_linear`, and that its arguments (x,
    context, weight, bilinear, bias, context_index, cu_seqlens) are plain and pass the checks below: so in most calls.
    """
    core = None if is_dynamo_compiling() else cpu.core()
    return core is not None and core.modulated_fits(arguments)


def fit_low_rank(scale, dropout, *arguments):
    """The same for `lora_linear`: (x, weight, A, B, bias, adapter_index, cu_seqlens, ranks)."""
    if type(scale) not in (float, int) or type(dropout) not in (float, int) or dropout != 0:
        return False
    core = None if is_dynamo_compiling() else cpu.core()
    return core is not None and core.lora_fits(arguments)


def fit_factored(*arguments):
    """The same for `factored_modulated_linear`: (x, context, weight, in_factor, context_factor, out_factor, bias,
    context_index, cu_seqlens)."""
    core = None if is_dynamo_compiling() else cpu.core()
    return core is not None and core.factored_fits(arguments)


def seen(operands):
    """The same of operands whose arguments passed the checks below."""
    core = None if is_dynamo_compiling() else cpu.core()
    return core is not None and core.ordinary_call(operands.flat())


def activations(op, x, context):
    """x and context are tensors of floats."""
    checks.tensor(op, "x", x, (2, 3), "[B, S, D] or packed [N, D]")
    checks.activation(op, "x", x)
    checks.tensor(op, "context", context, (2, 3), "[F, K] or [B, S, K]")


def contexts(op, x, context, context_index, cu_seqlens):
    """The contexts of x fit it."""
    checks.parameter(op, "context", context, x)
    if context.dim() == 2:
        checks.sequences(op, x, context, "context", context_index, "context_index", cu_seqlens)
        return
    for name, t in (("context_index", context_index), ("cu_seqlens", cu_seqlens)):
        if t is not None:
            raise ValueError(f"{op}: {name} must be None when context has one row per token, {list(context.shape)}")
    if x.dim() == 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; with a context per token it must be [B, S, D]")
    checks.shape(op, "context", context, (*x.shape[:2], context.shape[2]), "[B, S, K]")


def projection(op, x, context, weight, bilinear, bias, names=("weight", "bilinear", "bias")):
    checks.tensor(op, names[1], bilinear, (3,), "[D, E, K]")
    d_in, d_out = x.shape[-1], bilinear.shape[1]
    checks.fits(op, names[1], bilinear, x, (d_in, d_out, context.shape[-1]), "[D, E, K]")
    if weight is not None:
        checks.fits(op, names[0], weight, x, (d_in, d_out), "[D, E]")
    if bias is not None:
        checks.fits(op, names[2], bias, x, (d_out,), "[E]")


def factored(op, x, context, weight, in_factor, context_factor, out_factor, bias, context_index, cu_seqlens):
    """Those of `factored_modulated_linear` as (x, context, weight, in_factor, context_factor, out_factor, bias)."""
    activations(op, x, context)
    factors = (("in_factor", in_factor, "[D, R]"), ("context_factor", context_factor, "[K, R]"))
    for name, t, takes in (*factors, ("out_factor", out_factor, "[R, E]")):
        checks.tensor(op, name, t, (2,), takes)
    parameters = (context, weight, in_factor, context_factor, out_factor, bias)
    x, (context, weight, in_factor, context_factor, out_factor, bias) = checks.autocast(x, parameters)
    contexts(op, x, context, context_index, cu_seqlens)
    for name, t in (("in_factor", in_factor), ("context_factor", context_factor), ("out_factor", out_factor)):
        checks.parameter(op, name, t, x)
    rank, d_out = out_factor.shape
    checks.shape(op, "in_factor", in_factor, (x.shape[-1], rank), "[D, R]")
    checks.shape(op, "context_factor", context_factor, (context.shape[-1], rank), "[K, R]")
    if weight is not None:
        checks.fits(op, "weight", weight, x, (x.shape[-1], d_out), "[D, E]")
    if bias is not None:
        checks.fits(op, "bias", bias, x, (d_out,), "[E]")
    return x, context, weight, in_factor, context_factor, out_factor, bias


def backend_of(name, x, family="modulated"):
    """The backend that runs; a compiler leaves that to the call."""
    return name if torch.compiler.is_compiling() else resolve(name, x.device, x.dtype, family)


def low_rank(op, backend, x, weight, A, B, scale, bias, adapter_index, cu_seqlens, ranks, dropout, seed):
    """Those of `lora_linear` as (operands, options)."""
    checks.tensor(op, "x", x, (2, 3), "[B, S, D] or packed [N, D]")
    checks.activation(op, "x", x)
    for name, t, takes in (("A", A, "[b, r, D]"), ("B", B, "[b, E, r]")):
        checks.tensor(op, name, t, (3,), takes)
    if weight is not None:
        checks.tensor(op, "weight", weight, (2,), "[E, D]")
    if bias is not None:
        checks.tensor(op, "bias", bias, (1,), "[E]")
    x, (weight, A, B, bias) = checks.autocast(x, (weight, A, B, bias))
    checks.parameter(op, "A", A, x)
    checks.parameter(op, "B", B, x)
    d_out = B.shape[1]
    if weight is not None:
        checks.parameter(op, "weight", weight, x)
        checks.shape(op, "weight", weight, (weight.shape[0], x.shape[-1]), "[E, D]")
        d_out = weight.shape[0]
    checks.shape(op, "A", A, (*A.shape[:2], x.shape[-1]), "[b, r, D]")
    checks.shape(op, "B", B, (A.shape[0], d_out, A.shape[1]), "[b, E, r]")
    if bias is not None:
        checks.fits(op, "bias", bias, x, (d_out,), "[E]")
    checks.sequences(op, x, A, "A", adapter_index, "adapter_index", cu_seqlens)
    scales = None
    if isinstance(scale, Tensor):
        checks.constant(op, "scale", scale, torch.float32, x, A.shape[:1], "a number or [b]")
        scale, scales = 1.0, scale
    if ranks is not None:
        checks.constant(op, "ranks", ranks, torch.int64, x, A.shape[:1], "[b]")
    dropout = checks.share(op, "dropout", dropout)
    seed = checks.seed(op, seed, x) if dropout else None
    options = Options(DEFAULT_WORKSPACE, backend_of(backend, x, "lora"), checks.number(op, "scale", scale), dropout)
    return Operands(x, weight, A, B, bias, scales, ranks, seed, adapter_index, cu_seqlens), options

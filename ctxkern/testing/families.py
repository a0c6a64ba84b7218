"""The arguments of each public function as a dictionary by name, made from a case of the table."""

import torch

from .cases import CASES, make_inputs

# for adapters in place of contexts
LOW_RANK_CASES = [case for case in CASES if not case.per_token and case.id not in ("wide-k", "debug", "deep")]


def modulated_arguments(case, dtype=torch.float32, param_dtype=None, **how):
    """(arguments of `modulated_linear`, gradient of its output)."""
    inputs = make_inputs(case, dtype, param_dtype, **how)
    positional, keyword = inputs.arguments()
    return dict(zip(inputs.PARAMETERS, positional, strict=True)) | keyword, inputs.dy


def qkv_arguments(case, dtype=torch.float32, param_dtype=None, widths=None, seed=0, device="cpu"):
    """(arguments of a function under `by_projection`, gradients of its three outputs); widths: E of q, k and v."""
    arguments, dout = modulated_arguments(case, dtype, param_dtype, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed + 1)
    douts = []
    bilinear, weight, bias = (arguments.pop(name) for name in ("bilinear", "weight", "bias"))
    for i, width in enumerate(widths or [case.E] * 3):
        made = {
            f"weight{i}": None if weight is None else _normal(generator, weight, case.D, width, scale=case.D),
            f"bilinear{i}": _normal(generator, bilinear, case.D, width, case.K, scale=case.D * case.K),
            f"bias{i}": None if bias is None else _normal(generator, bias, width),
        }
        arguments |= made
        douts.append(_normal(generator, dout, *dout.shape[:-1], width))
    return arguments, douts


def by_projection(fn):
    """`modulated_qkv` (or its reference) as a function of weight0, weight1, ... by name."""

    def flat(x, context, context_index=None, cu_seqlens=None, **each):
        lists = ([each[f"{name}{i}"] for i in range(3)] for name in ("weight", "bilinear", "bias"))
        return fn(x, context, *lists, context_index=context_index, cu_seqlens=cu_seqlens)

    return flat


def lora_arguments(case, rank, dtype=torch.float32, adapter_dtype=None, weight_dtype=None, scale=0.5, seed=0):
    """(arguments of `lora_linear`, gradient of its output); the case's context table stands for the adapters'."""
    arguments, dout = modulated_arguments(case, dtype, weight_dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, like = len(arguments["context"]), torch.empty(0, dtype=adapter_dtype or dtype)
    return {
        "x": arguments["x"],
        "weight": None if arguments["weight"] is None else arguments["weight"].mT,
        "A": _normal(generator, like, rows, rank, case.D, scale=case.D),
        "B": _normal(generator, like, rows, case.E, rank, scale=rank),
        "scale": scale,
        "bias": arguments["bias"],
        "adapter_index": arguments["context_index"],
        "cu_seqlens": arguments["cu_seqlens"],
    }, dout


def factored_arguments(case, rank, dtype=torch.float32, param_dtype=None, seed=0):
    """(arguments of `factored_modulated_linear`, gradient of its output)."""
    arguments, dout = modulated_arguments(case, dtype, param_dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    like = arguments.pop("bilinear")
    return arguments | {
        "in_factor": _normal(generator, like, case.D, rank, scale=case.D),
        "context_factor": _normal(generator, like, case.K, rank, scale=case.K),
        "out_factor": _normal(generator, like, rank, case.E, scale=rank),
    }, dout


def _normal(generator, like, *shape, scale=1):
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * max(scale, 1) ** -0.5
    return drawn.to(like.device, like.dtype)

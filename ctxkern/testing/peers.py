"""What ctxkern is measured against, each as its users write it."""

import functools

import torch
import torch.nn.functional as F

from ctxkern import reference
from ctxkern.functional import modulated_linear, modulated_qkv


def einsum(x, context, weight, bilinear, bias=None, *, context_index=None, cu_seqlens=None):
    """The layer as users first write it."""
    return reference.modulated_linear_ref(
        x, context, weight, bilinear, bias, context_index=context_index, cu_seqlens=cu_seqlens
    )


def addmm_bmm(x, context, weight, bilinear, bias=None, *, context_index=None):
    """The best form in plain PyTorch: all weights by one addmm in the layout that bmm wants."""
    D, E, K = bilinear.shape
    made = _all_weights(x, context, weight, bilinear.reshape(D * E, K).t(), context_index).view(-1, D, E)
    y = torch.bmm(x, made)
    return y if bias is None else y + bias.to(x.dtype)


def addmm_bmm_k_major(x, context, weight, bilinear_k, bias=None, *, context_index=None):
    """The same for a model that stores `bilinear` as [K, D, E]."""
    K, D, E = bilinear_k.shape
    made = _all_weights(x, context, weight, bilinear_k.view(K, D * E), context_index).view(-1, D, E)
    y = torch.bmm(x, made)
    return y if bias is None else y + bias.to(x.dtype)


def grouped_mm(x, context, weight, bilinear, bias=None, *, context_index=None, cu_seqlens):
    """All weights made, then torch's grouped product over packed sequences."""
    D, E, K = bilinear.shape
    made = _all_weights(x, context, weight, bilinear.reshape(D * E, K).t(), context_index).view(-1, D, E)
    y = F.grouped_mm(x, made, offs=cu_seqlens[1:])
    return y if bias is None else y + bias.to(x.dtype)


def _all_weights(x, context, weight, flat, context_index):
    """[B, D·E] in the dtype of x; wider parameters are cast first, as autocast does."""
    context = context if context_index is None else context[context_index]
    context, flat = context.to(x.dtype), flat.to(x.dtype)
    return context @ flat if weight is None else torch.addmm(weight.reshape(1, -1).to(x.dtype), context, flat)


def linear(x, context, weight, bilinear, bias=None, *, context_index=None, cu_seqlens=None):
    """One plain shared linear layer of the same size: the price line."""
    return F.linear(x, weight.mT.to(x.dtype), None if bias is None else bias.to(x.dtype))


def forms(inputs, compiled=False, backends=()):
    """{name: fn of (x, context, weight, bilinear, bias)} of the peers that a case has, ctxkern first; backends: of
    ctxkern, by name, in addition to the one that it chooses."""
    index, bounds = inputs.context_index, inputs.cu_seqlens
    ours = functools.partial(modulated_linear, context_index=index, cu_seqlens=bounds)
    made = {
        "ctxkern": ours,
        **{f"ctxkern {name}": functools.partial(ours, backend=name) for name in backends},
        "einsum": functools.partial(einsum, context_index=index, cu_seqlens=bounds),
    }
    if bounds is not None:
        if hasattr(F, "grouped_mm") and inputs.x.dtype is torch.bfloat16:
            made["grouped_mm"] = functools.partial(grouped_mm, context_index=index, cu_seqlens=bounds)
    elif inputs.context.dim() == 2:
        made["addmm+bmm"] = functools.partial(addmm_bmm, context_index=index)
        made["addmm+bmm K-major"] = functools.partial(addmm_bmm_k_major, context_index=index)
    if compiled:
        for name in ("einsum", "addmm+bmm"):
            if name in made:
                made[f"compile {name}"] = torch.compile(made[name], dynamic=False)
    if inputs.weight is not None:
        made["linear"] = linear
    return made


def three_projections(inputs, backward=False, backend=None):
    """A callable that runs thirds of the columns of `inputs` as Q, K and V of one call: the work of one layer of E."""
    leaves = inputs.leaves() if backward else inputs.map(lambda t: t.detach())
    (x, context, *parameters), keyword = leaves.arguments()
    width = inputs.bilinear.shape[1] // 3
    dims = ("weight", 1), ("bilinear", 1), ("bias", 0)
    lists = [
        [None if t is None else t.detach().narrow(dim, i * width, width).clone() for i in range(3)]
        for t, (_, dim) in zip(parameters, dims, strict=True)
    ]
    given = [x, context, *(t.requires_grad_(backward) for each in lists for t in each if t is not None)]
    douts = [inputs.dy.narrow(-1, i * width, width).contiguous() for i in range(3)]

    def call():
        with torch.set_grad_enabled(backward):
            ys = modulated_qkv(x, context, *lists, **keyword, backend=backend)
        return (ys, torch.autograd.grad(ys, given, douts)) if backward else ys

    return call


def calls(inputs, backward=False, compiled=False, backends=()):
    """{name: callable without arguments} that runs each form on the inputs, forward or forward and backward."""
    leaves = inputs.leaves() if backward else inputs.map(lambda t: t.detach())
    positional, _ = leaves.arguments()
    made = {}
    for name, fn in forms(inputs, compiled, backends).items():
        args = positional
        if name == "addmm+bmm K-major":
            k_major = leaves.bilinear.detach().permute(2, 0, 1).contiguous().requires_grad_(backward)
            args = (*positional[:3], k_major, *positional[4:])
        made[name] = functools.partial(_forward_backward if backward else _forward, fn, args, inputs.dy)
    return made


@torch.no_grad()
def _forward(fn, args, dy):
    return fn(*args)


def _forward_backward(fn, args, dy):
    y = fn(*args)
    given = [t for t in args if t is not None]
    return y, torch.autograd.grad(y, given, dy, allow_unused=True)

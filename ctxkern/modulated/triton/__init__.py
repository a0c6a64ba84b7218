"""Triton kernels of the modulated operators: which form a call takes, and the launches that are kept for the next one.

panel*.py and outer*.py have the maths, the kernels and their launchers; library.py the products that are torch's.
"""

import math

from ctxkern.modulated.operands import (
    Gradients,
    Operands,
    check_values,
    contiguous,
    fill_with_biases,
    new_gradients,
    new_outputs,
    rounds_to_tf32,
)
from ctxkern.modulated.plan import describe, gpu_terms, outer_above
from ctxkern.plan import forced
from ctxkern.runtime.triton import tiles
from ctxkern.runtime.triton.launches import Layout, operands_of

from . import outer, outer_backward, panel, panel_backward
from .call import Call
from .cost import predicted_seconds
from .projections import Projection

__all__ = ["backward", "forward", "plan"]


def _is_outer(call):
    return call.most_contexts > outer_above(gpu_terms(), call.tokens, call.per_token)


def forward(operands, workspace_bytes):
    """[y], one per projection, in the dtype of x and the leading shape of x."""
    check_values(operands)
    outs = new_outputs(operands)
    if operands.x.numel():
        _run(_forward, _dense(operands), outs, (), workspace_bytes)
    else:
        fill_with_biases(outs, operands.biases)
    return outs


def _forward(call, operands, outs, _):
    projections = [*map(Projection, operands.weights, operands.bilinears, operands.biases, outs)]
    (outer if _is_outer(call) else panel).forward(call, projections)


def backward(douts, operands, workspace_bytes, needs):
    """The `Gradients` that `needs` asks for."""
    check_values(operands)
    douts = [*map(contiguous, douts)]
    grads = new_gradients(douts, operands, needs)
    if grads.context is not None:
        grads.context.zero_()  # kernels write the rows of contexts in use
    if operands.x.numel() and any(dout.numel() for dout in douts):
        if grads.from_kernels():
            without = operands._replace(biases=[None] * len(douts))
            _run(_backward, _dense(without), douts, grads._replace(biases=without.biases).flat(), workspace_bytes)
    else:
        for grad in grads.from_kernels():
            grad.zero_()
    return grads


def _backward(call, operands, douts, grads):
    grads = Gradients.of(grads)
    lists = operands.weights, operands.bilinears, operands.biases, douts, grads.weights, grads.bilinears
    projections = [*map(Projection, *lists)]
    (outer_backward if _is_outer(call) else panel_backward).backward(call, projections, grads.x, grads.context)


def _dense(operands):
    """Parameters keep their strides; all else is read as it lies in memory."""
    x, context, weights, bilinears, biases, *spans = operands
    return Operands(
        contiguous(x), contiguous(context), weights, bilinears, [*map(contiguous, biases)], *map(contiguous, spans)
    )


# launches by all that they depend on; at this many calls of different sizes all of them are laid out again
_KEPT, _MOST_KEPT = {}, 1024
tiles.AFTER.append(_KEPT.clear)


def _run(lay_out, operands, rows, grads, workspace_bytes):
    """Runs lay_out(call, operands, rows, grads) on `Operand`s that stand for the tensors.

    rows: y or dy of each projection. grads: those of the operands, flat.
    """
    x = operands.x
    tensors = [*operands.flat(), *rows, *grads]
    switches = forced.strategy, forced.library, tuple(forced.tiles.items()), rounds_to_tf32(x.dtype)
    key = (lay_out, len(rows), workspace_bytes, x.device, switches, *map(_layout, tensors))
    launches = _KEPT.get(key)
    if launches is None:
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        layout, stand_ins = Layout(len(tensors)), [*operands_of(tensors)]
        given, at = len(operands.flat()), len(operands.flat()) + len(rows)
        of = Operands.of(stand_ins[:given])
        lay_out(Call(of, workspace_bytes, x.device, layout), of, stand_ins[given:at], stand_ins[at:])
        launches = _KEPT[key] = layout.done()
    launches.run(tensors, x.device)


def _layout(t):
    """What of a tensor a launch depends on."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16)


def plan(operands, workspace_bytes, backward):
    """The plan of one projection; contexts: the most there can be, as how many differ is known on the device alone."""
    x, bilinear = operands.x, operands.bilinears[0]
    flat = operands.flat()
    call = Call(Operands.of([*operands_of(flat)]), workspace_bytes, x.device, Layout(len(flat)))
    d_out = bilinear.shape[1]
    strategy = "outer" if _is_outer(call) else "panel"
    problem = call.problem(d_out, operands.weights[0] is not None)
    made, library = None, False
    if strategy == "outer":
        strip, group, used = d_out, call.tokens, 0
    elif backward:
        made, share, library = panel_backward.backward_choice(call, (d_out,), True)
        strip, group, used = made.rows, made.group, math.prod(made) * x.dtype.itemsize + share
    else:
        made, library = panel.forward_choice(call, (d_out,), operands.biases[0] is not None)
        strip, group, used = made.width, made.group, math.prod(made) * x.dtype.itemsize
    predicted = (
        predicted_seconds(problem, strategy, made, backward, library) if call.tokens and call.most_contexts else None
    )
    return describe(
        problem,
        strategy=strategy,
        backend="triton",
        strip=strip,
        group=group,
        workspace_bytes=used,
        strip_of="D" if backward else "E",
        predicted_seconds=predicted,
        library=library,
    )

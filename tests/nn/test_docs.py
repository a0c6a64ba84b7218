"""Public names of ctxkern.nn, attach and serve, `swap` and `merge`: typed, with a docstring whose example runs."""

import doctest
import inspect
import tempfile

import pytest
import torch
from torch import nn

import ctxkern
import ctxkern.attach
import ctxkern.nn
import ctxkern.serve
from ctxkern.nn.block import TransformerBlock
from ctxkern.nn.merged import MergedAttention, MergedLinear

PUBLIC = {name: getattr(ctxkern.nn, name) for name in ctxkern.nn.__all__} | {
    "swap": ctxkern.swap,
    "merge": ctxkern.merge,
    "TransformerBlock": TransformerBlock,
    "MergedAttention": MergedAttention,
    "MergedLinear": MergedLinear,
}
PUBLIC |= {name: getattr(ctxkern.attach, name) for name in ctxkern.attach.__all__}
PUBLIC |= {name: getattr(ctxkern.serve, name) for name in ("cache_weights", "quantize_bilinear", "Int8Bilinear")}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    torch.manual_seed(0)
    (found,) = doctest.DocTestFinder(recurse=False).find(
        PUBLIC[name], name, globs=PUBLIC | {"torch": torch, "nn": nn, "tempfile": tempfile}
    )
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def functions(public):
    if inspect.isfunction(public):
        return [public]
    own = [getattr(m, "fget", None) or getattr(m, "__func__", None) or m for m in vars(public).values()]
    return [f for f in own if inspect.isfunction(f)]


@pytest.mark.parametrize("name", PUBLIC)
def test_is_typed(name):
    for function in functions(PUBLIC[name]):
        signature = inspect.signature(function)
        untyped = [p for n, p in signature.parameters.items() if n not in ("self", "cls") and p.annotation is p.empty]
        assert not untyped, function
        assert signature.return_annotation is not signature.empty, function

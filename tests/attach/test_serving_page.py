"""docs/serving.md keeps its word: its blocks run top to bottom, and its figures are those of the code."""

import re
from pathlib import Path

import pytest
import torch

import ctxkern
from ctxkern.serve import Int8Bilinear

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BLOCK = re.compile(r"(<!-- fragment -->\n)?```python\n(.*?)```", re.DOTALL)


def test_its_blocks_run_one_after_another(capsys):
    torch.manual_seed(0)
    names = {}
    for fragment, text in BLOCK.findall(PAGE.read_text()):
        code = compile(text, str(PAGE), "exec")
        if not fragment:
            exec(code, names)
    printed = capsys.readouterr().out
    assert "hits=12, misses=6" in printed
    assert float(printed.splitlines()[-1]) < 0.01
    x, table = names["x"], names["table"]
    with ctxkern.use(names["model"], context=table[3:4]):
        torch.testing.assert_close(names["one_file"](x[:1]), names["model"](x[:1]))


@pytest.mark.parametrize("context_dim", [16, 64])
def test_its_figures_of_int8(context_dim):
    torch.manual_seed(0)
    shape = (192, 96, context_dim)  # a scale has K values, whatever D and E are
    low_rank = torch.einsum(
        "dr,re,kr->dek", torch.randn(shape[0], 8), torch.randn(8, shape[1]), torch.randn(context_dim, 8)
    )
    uneven = (low_rank + torch.randn(shape)) * torch.randn(shape[0], 1, 1).exp() * torch.randn(shape[1], 1).exp()
    drawn = {
        "gaussian": torch.randn(shape),
        "low rank": uneven,
        "heavy tails": torch.distributions.StudentT(torch.tensor(4.0)).sample(shape),
    }
    context = torch.randn(16, context_dim)
    for name, bilinear in drawn.items():
        weights = bilinear @ context.mT
        error = ((Int8Bilinear(bilinear).tensor() @ context.mT - weights).norm() / weights.norm()).item()
        (row,) = re.findall(rf"^\| {name}.*\| (.*) % \| (.*) % \|$", PAGE.read_text(), re.MULTILINE)
        stated = float(row[context_dim == 64]) / 100
        assert 0.85 * stated < error < 1.15 * stated, name

"""From averaging to attention: the printed numbers, four ways to one result, and the rungs."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import failed, write

from ctxkern.cli import build_parser, main
from ctxkern.experiments.core.data.paths import FoundFiles
from ctxkern.experiments.core.experiment import Inputs
from ctxkern.experiments.gpt.config import GPTConfig
from ctxkern.experiments.ladder import averaging, commands
from ctxkern.experiments.ladder.experiment import LadderSettings, LadderTraining
from ctxkern.experiments.ladder.rungs import RUNGS, build

TOKENS = [
    [0.1808, -0.0700], [-0.3596, -0.9152], [0.6258, 0.0255], [0.9545, 0.0643],
    [0.3612, 1.1679], [-1.3499, -0.5102], [0.2360, -0.2398], [-0.9211, 1.5433],
]  # fmt: skip
MEANS = [
    [0.1808, -0.0700], [-0.0894, -0.4926], [0.1490, -0.3199], [0.3504, -0.2238],
    [0.3525, 0.0545], [0.0688, -0.0396], [0.0927, -0.0682], [-0.0341, 0.1332],
]  # fmt: skip
WAYS = [averaging.mean_by_loop, averaging.mean_by_matrix, averaging.mean_by_softmax]


def rounded(x):
    """What is printed with four decimals."""
    return [[round(value, 4) for value in row] for row in x.tolist()]


@pytest.mark.parametrize("way", WAYS)
def test_the_printed_tokens_and_means(way):
    x = averaging.example()
    assert x.shape == (4, 8, 2)
    torch.manual_seed(1337)
    assert torch.equal(x, torch.randn(4, 8, 2))
    assert rounded(x[0]) == TOKENS
    assert rounded(way(x)[0]) == MEANS


def test_the_printed_sums_of_rows():
    ones, numbers = averaging.triangular_example()
    assert ones.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert numbers.tolist() == [[9, 5], [4, 5], [7, 4]]
    assert (ones @ numbers).tolist() == [[9, 5], [13, 10], [20, 14]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 9, 5)])
def test_all_ways_are_one(shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected = x.cumsum(1) / torch.arange(1, shape[1] + 1)[:, None]
    for way in WAYS:
        torch.testing.assert_close(way(x), expected)
    none, one = torch.zeros(shape[2], 3, dtype=torch.float64), torch.eye(shape[2], dtype=torch.float64)
    torch.testing.assert_close(averaging.head(x, none, none, one), expected)


def test_a_head_is_attention_with_gradients():
    x, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 6), (6, 3), (6, 3), (6, 4)))
    query, key, value = weights
    y = averaging.head(x, query, key, value)
    expected = F.scaled_dot_product_attention(x @ query, x @ key, x @ value, is_causal=True)
    torch.testing.assert_close(y, expected)
    along = torch.randn_like(y)
    got, right = (torch.autograd.grad(out, [x, *weights], along) for out in (y, expected))
    torch.testing.assert_close(got, right)
    # the scale keeps the variance of scores, whatever the width
    wide = [torch.randn(64, 64, dtype=torch.float64) / 8 for _ in range(3)]
    tokens = torch.randn(2, 50, 64, dtype=torch.float64)
    scaled, raw = (averaging.head(tokens, *wide, scaled=scaled) for scaled in (True, False))
    # unscaled ones pick few values, of variance 1, and are no mean
    assert raw[:, 25:].var() > 4 * scaled[:, 25:].var()


def config(**changes):
    return GPTConfig(vocab_size=11, d_model=8, n_heads=4, n_layers=3, block_size=6, init_std=0.3, **changes)


def test_each_rung_has_one_part_more():
    models = {name: build(name, config()) for name in RUNGS}
    assert [len(getattr(model, "blocks", ())) for model in models.values()] == [0, 1, 1, 1, 3, 3]
    assert models["bigram"].token_embeddings.weight.shape == (11, 11)
    blocks = {name: model.blocks[0] for name, model in models.items() if name != "bigram"}
    assert [block.attention.n_heads for block in blocks.values()] == [1, 4, 4, 4, 4]
    parts = {name: {p.rpartition(".")[0] for p, _ in block.named_parameters()} for name, block in blocks.items()}
    qkv = {f"attention.W_{name}_base" for name in "qkv"}
    mlp, norms = {"mlp.0", "mlp.2"}, {"attention_norm", "mlp_norm"}
    assert list(parts.values()) == [
        qkv,
        qkv,
        qkv | mlp,
        qkv | mlp | {"attention.W_o"},
        qkv | mlp | {"attention.W_o"} | norms,
    ]
    assert [block.residual for block in blocks.values()] == [False, False, False, True, True]
    assert (models["residual"].norm, type(models["norm"].norm)) == (None, torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="rung is 'top'; it must be one of bigram, head"):
        build("top", config())


def test_the_rung_of_one_head_is_that_head():
    model = build("head", config()).double()
    ids = torch.randint(0, 11, (2, 6))
    x = model.token_embeddings(ids) + model.position_embeddings.weight
    layer = model.blocks[0].attention
    y = averaging.head(x, layer.W_q_base.weight, layer.W_k_base.weight, layer.W_v_base.weight)
    torch.testing.assert_close(model(ids), model.head(y))


@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_see_nothing_later_and_bigrams_nothing_earlier(rung):
    model = build(rung, config()).double()
    ids = torch.randint(0, 11, (2, 6))
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    one, two = model(ids), model(other)
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3], two[:, 3])
    assert torch.allclose(one[:, 4:], two[:, 4:]) == (rung == "bigram")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that is known from the character before the last one, not from the last one alone."""
    folder = tmp_path_factory.mktemp("text")
    return write(folder, "text.txt", "abacbdcadbc" * 60)


FLAGS = ["--d-model", "8", "--n-layers", "1", "--batch-size", "8", "--eval-iters", "4", "--device", "cpu", "--quiet"]


def learn(rung, text, steps):
    """The losses of the whole validation text before and after some steps."""
    sizes = {"d_model": 8, "n_layers": 1, "batch_size": 16, "lr": 0.02, "bigram_lr": 0.1, "device": "cpu"}
    job = LadderTraining().prepare(LadderSettings(rung=rung, **sizes), Inputs(FoundFiles([text])))
    batches, before = job.batches(), job.whole_losses(job.model)
    for step in range(steps):
        job.optimizer.zero_grad()
        job.loss(job.model, batches(step)).backward()
        job.optimizer.step()
    return before["text.txt"], job.whole_losses(job.model)["text.txt"]


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_learns(text, rung):
    before, after = learn(rung, text, 40)
    assert before == pytest.approx(math.log(4), abs=0.2)
    assert after < math.log(4) - 0.2


def test_attention_learns_what_bigrams_cannot(text):
    """The entropy of a character, where the last one alone is known, is a floor for bigrams, not for a transformer."""
    ids = torch.tensor([ord(c) - 97 for c in text.read_text()])
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs.index_put_((ids[:-1], ids[1:]), torch.ones(()).double(), accumulate=True)
    known = pairs / pairs.sum(1, keepdim=True)
    floor = -(pairs / pairs.sum() * known.clamp(min=1e-9).log()).sum().item()
    assert learn("bigram", text, 150)[1] > floor - 0.05
    assert learn("norm", text, 150)[1] < floor - 0.2


def test_the_numbers_are_shown(capsys):
    assert main(["ladder", "show"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 1 1 @ 7 4 = 20 14" in out
    for token, mean in zip(TOKENS, MEANS, strict=True):
        assert f"{token[0]:.4f} {token[1]:.4f} {mean[0]:.4f} {mean[1]:.4f}" in out


def test_a_climb_is_run_and_drawn(text, tmp_path, capsys):
    place = tmp_path / "climb"
    argv = [
        "ladder",
        "climb",
        str(text),
        *FLAGS,
        "--steps",
        "3",
        "--run-dir",
        str(place),
        "--rung",
        "heads",
        "--seed",
        "4",
    ]
    assert main(argv) == 0
    (row,) = csv.DictReader((place / "ladder.csv").open())
    stored = json.loads((place / "runs" / "heads-seed-4" / "result.json").read_text())["details"]["whole"]
    assert (row["rung"], row["seed"], row["steps"], float(row["loss"])) == ("heads", "4", "3", stored["text.txt"])
    assert (place / "ladder.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert "n_heads is 3; it must be a divisor of d_model = 8" in failed(capsys, *argv, "--n-heads", "3")
    before = text.read_bytes()
    try:
        text.write_text("another text\n" * 40)
        assert "text.txt, which has changed since; name another folder" in failed(capsys, *argv)
    finally:
        text.write_bytes(before)


def test_the_table_says_what_each_rung_brings(tmp_path):
    losses = {"bigram": (2.5, 2.3), "head": (2.25, 2.25), "norm": (2.0, 2.1)}
    rows = [
        {"rung": rung, "seed": seed, "loss": loss, "steps": 9, "parameters": 1234}
        for rung, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    lines = [line.split() for line in commands.table(rows).splitlines()[1:]]
    assert lines == [
        ["bigram", "2.4000", "1,234"],
        ["head", "2.2500", "0.1500", "1,234"],
        ["norm", "2.0500", "0.2000", "1,234"],
    ]
    commands.plot(rows, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_all_rungs_are_planned(text):
    args = build_parser().parse_args(["ladder", "climb", str(text), "--run-dir", "x", "--seeds", "2", "--lr", "0.5"])
    points = commands.plan(args)
    assert [(point.rung, point.seed) for point in points] == [(rung, seed) for seed in (0, 1) for rung in RUNGS]
    for point in points:
        given = build_parser().parse_args([*point.run.arguments, "--run-dir", "y"])
        assert (given.rung, given.seed, given.lr, given.paths) == (point.rung, point.seed, 0.5, [str(text)])

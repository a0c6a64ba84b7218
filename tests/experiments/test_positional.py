"""Many students at once: the closed form is the definition, and the grid is what it says."""

import math

import pytest
import torch
from torch.testing import assert_close

from ctxkern.experiments.positional.config import CurveSettings, SweepSettings
from ctxkern.experiments.positional.data import draw_samples, draw_student, draw_teacher, draw_tests
from ctxkern.experiments.positional.definition import descend, loss, student, teacher
from ctxkern.experiments.positional.descent import Descent, errors, make_block, make_targets, slopes
from ctxkern.experiments.positional.sweep import Part, Program, summarise

SEEDS, D, COUNTS, OMEGAS, RIDGES = 2, 12, (5, 9, 17), (0.0, 0.3, 1.0), (0.01, 0.5)
MATRIX = torch.tensor([[0.6, 0.4], [0.3, 0.9]], dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(rank, held=None, lr=0.15):
    """(Descent, x, q*) of all experiments."""
    x, q_star = drawn(SEEDS, COUNTS[-1], 2, D) / 2, drawn(SEEDS, D, seed=1)
    query = drawn(SEEDS, len(COUNTS), len(OMEGAS), len(RIDGES), rank, D, seed=2)
    tensors = (torch.tensor(each, dtype=torch.float64) for each in (OMEGAS, RIDGES))
    omegas, ridges = tensors
    return Descent(x, q_star, COUNTS, omegas, MATRIX, query, ridges, lr, held), x, q_star


def each(x, q_star):
    """(place in the grid, samples, targets) of every experiment."""
    for s in range(SEEDS):
        for g, count in enumerate(COUNTS):
            for w, omega in enumerate(OMEGAS):
                mine = x[s, :count]
                for m in range(len(RIDGES)):
                    yield (s, g, w, m), mine, teacher(mine, q_star[s], omega, MATRIX)


def softmax(scores):
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def mixed(rows, x):
    return [[sum(row[k] * x[k][i] for k in range(2)) for i in range(len(x[0]))] for row in rows]


def test_the_definition_is_the_literal_one():
    x, q_star, query = drawn(1, 2, 4) / 2, drawn(4, seed=1), drawn(4, 2, seed=2)
    tokens, width = x[0].tolist(), 4
    h = [sum(a * b for a, b in zip(token, q_star.tolist(), strict=True)) / width**0.5 for token in tokens]
    semantic = [softmax([h[row] * h[k] for k in range(2)]) for row in range(2)]
    rows = [[0.7 * semantic[i][k] + 0.3 * float(MATRIX[i, k]) for k in range(2)] for i in range(2)]
    target = mixed(rows, tokens)
    placed = [[value + sign / width**0.5 for value in token] for token, sign in zip(tokens, (1, -1), strict=True)]
    heads = [[sum(token[i] * float(query[i, j]) for i in range(width)) for j in range(2)] for token in placed]
    scores = [[sum(a * b for a, b in zip(one, other, strict=True)) / width for other in heads] for one in heads]
    out = mixed([softmax(row) for row in scores], placed)
    assert_close(teacher(x, q_star, 0.3, MATRIX)[0], torch.tensor(target, dtype=torch.float64))
    assert_close(student(x, query)[0], torch.tensor(out, dtype=torch.float64))
    expected = sum((out[i][j] - target[i][j]) ** 2 for i in range(2) for j in range(width)) / (2 * width)
    penalty = 0.05 * sum(float(value) ** 2 for value in query.flatten())
    found = loss(x, torch.tensor([target], dtype=torch.float64), query, 0.1)
    assert_close(float(found), expected + penalty)


@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_and_losses_are_those_of_autograd(rank):
    descent, x, q_star = grid(rank)
    gradient = descent.gradient().view_as(descent.query)
    learnt, held = descent.losses()
    penalty = descent.penalty()
    for place, mine, target in each(x, q_star):
        query = descent.query[place].mT.clone().requires_grad_()
        value = loss(mine, target, query)
        assert_close(gradient[place].mT, torch.autograd.grad(value, query)[0])
        assert_close(learnt[place], value.detach())
        ridge = RIDGES[place[-1]]
        assert_close(learnt[place] + penalty[place], loss(mine, target, query, ridge).detach())
    assert not held.any()


def test_slopes_are_derivatives_of_errors_in_h():
    block = make_block(drawn(1, 6, 2, D) / 2, drawn(1, D, seed=1))
    targets = make_targets(block, torch.tensor([0.3], dtype=torch.float64), MATRIX)
    h = drawn(1, 1, 1, 1, 2, 2, 6, seed=3).requires_grad_()
    a = torch.sigmoid((h * (h[..., :1, :] - h[..., 1:, :])).sum(-3))
    (gradient,) = torch.autograd.grad(errors(a, targets).sum(), h)
    assert_close(slopes(h.detach(), targets), gradient)


@pytest.mark.parametrize("rank", [1, 2])
def test_descent_is_a_loop_over_experiments(rank, monkeypatch):
    # several blocks in one α
    monkeypatch.setattr("ctxkern.experiments.positional.descent.BLOCK", 3)
    descent, x, q_star = grid(rank)
    start = descent.query.clone()
    for _ in range(30):
        descent.step()
    for place, mine, target in each(x, q_star):
        expected = descend(mine, target, start[place].mT, ridge=RIDGES[place[-1]], lr=0.15, steps=30)
        assert_close(descent.query[place].mT, expected)


def test_samples_that_are_held_out_are_not_learnt_from():
    held = torch.stack([torch.arange(COUNTS[-1]) % 3 == 1, torch.zeros(COUNTS[-1], dtype=torch.bool)])
    descent, x, q_star = grid(1, held)
    start = descent.query.clone()
    for _ in range(5):
        descent.step()
    learnt, kept = descent.losses()
    for (s, g, w, m), mine, target in each(x, q_star):
        out = held[m, : COUNTS[g]]
        expected = descend(mine[~out], target[~out], start[s, g, w, m].mT, ridge=RIDGES[m], lr=0.15, steps=5)
        assert_close(descent.query[s, g, w, m].mT, expected)
        assert_close(learnt[s, g, w, m], loss(mine[~out], target[~out], expected))
        assert_close(kept[s, g, w, m], loss(mine[out], target[out], expected))


def program(**changes):
    changes = {"d": 10, "alphas": "0.7,1.2", "omegas": "0,0.3", "steps": 20, "test_samples": 60} | changes
    settings = SweepSettings(**{"dtype": "float64", "matrix": "0.6,0.4,0.3,0.9"} | changes)
    alphas = tuple(range(len(settings.alpha_values())))
    return Program(settings, Part((3, 4), alphas))


def test_rows_are_measures_of_the_definition():
    made = program(ridges="0.01,0.1", inits="semantic,positional,random", rank=2, linear_ridge=0.3)
    for _ in range(3):
        made.descent.step()
    rows = made.rows()
    assert len(rows) == 2 * 2 * 2 * 2 * 3
    tests = torch.cat(list(draw_tests((4,), 60, 10, 0.5)), 1)[0].double()
    star = draw_teacher(4, 10).double()
    for row in rows:
        if row["seed"] != 4:
            continue
        x = draw_samples(4, row["samples"], 10, 0.5).double()
        target, fresh = (teacher(each, star, row["omega"], MATRIX) for each in (x, tests))
        start = draw_student(4, row["init"], star.float(), 2).double()
        query = descend(x, target, start.mT, ridge=row["ridge"], lr=0.15, steps=3)
        assert_close(row["train_error"], float(loss(x, target, query, row["ridge"])))
        assert_close(row["train_loss"], float(loss(x, target, query)))
        assert_close(row["test_error"], float(loss(tests, fresh, query)) / 60)
        assert_close(row["m"], float((query.sum(0) / 10).norm()))
        assert_close(row["theta"], float((star @ query / 10).norm()))
        assert_close(row["norm"], float(query.square().sum() / 10))
        # ridge regression by augmented rows: tokens are the features, entries the cases
        features = torch.cat([x.transpose(0, 1).flatten(1).mT, (10 * 0.3) ** 0.5 * torch.eye(2).double()])
        answers = torch.cat([target.transpose(0, 1).flatten(1).mT, torch.zeros(2, 2).double()])
        baseline = torch.linalg.lstsq(features, answers).solution.mT
        assert_close(row["linear_test_error"], float((baseline @ tests - fresh).square().sum()) / 20 / 60)


def test_students_begin_as_they_are_named():
    star = draw_teacher(0, 50)
    assert_close(draw_student(0, "semantic", star, 1), star[None])
    assert_close(draw_student(0, "positional", star, 1), torch.full((1, 50), 50**-0.5))
    # |N(0, 0.1²)|² of 10⁵ entries, six standard deviations
    mean = draw_student(0, "random", torch.zeros(10**5), 1).square().mean() / 0.01
    assert abs(float(mean) - 1) < 6 * (2 / 10**5) ** 0.5
    wide = draw_student(0, "semantic", star, 3)
    assert_close(wide[0], star)
    assert wide[1:].ne(0).all()
    assert_close(wide[1:], draw_student(0, "random", star, 3)[1:])


def test_fewer_samples_are_the_first_ones():
    assert torch.equal(draw_samples(1, 30, 7, 0.5)[:8], draw_samples(1, 8, 7, 0.5))
    assert not torch.equal(draw_samples(1, 30, 7, 0.5, apart=True)[:8], draw_samples(1, 8, 7, 0.5, apart=True))
    assert not torch.equal(draw_samples(1, 8, 7, 0.5), draw_samples(2, 8, 7, 0.5))


def test_float32_agrees_far_below_the_noise_of_seeds():
    found = {}
    for dtype in ("float32", "float64"):
        settings = SweepSettings(d=40, alphas="1.0,2.0", steps=1500, test_samples=500, dtype=dtype)
        made = Program(settings, Part((0, 1, 2, 3), (0, 1)))
        for _ in range(settings.steps):
            made.descent.step()
        found[dtype] = made.rows()
    names = ("train_error", "test_error", "m", "theta")
    for row in summarise(found["float64"], names):
        pairs = [
            (single, double)
            for single, double in zip(found["float32"], found["float64"], strict=True)
            if (single["alpha"], single["init"]) == (row["alpha"], row["init"])
        ]
        assert len(pairs) == 4
        for name in names:
            assert max(abs(a[name] - b[name]) for a, b in pairs) < row[f"{name}_sd"] / 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": "1,x"}, "alphas has 'x'; it must be numbers with commas between"),
        ({"alphas": "-1"}, "alphas has -1; it must be numbers of at least"),
        ({"alphas": "0.01", "d": 20}, "alphas has 0.01; it must be at least 1/d = 0.05, one sample"),
        ({"omegas": "1.5"}, "omegas has 1.5; it must be numbers from 0 to 1"),
        ({"ridges": "nan"}, "ridges has nan; it must be numbers of at least 0"),
        ({"matrix": "1,2,3"}, "matrix is '1,2,3'; it must be four numbers"),
        ({"inits": "semantic,warm"}, "inits has 'warm'; it must be of semantic, positional, random"),
        ({"folds": 1}, "folds is 1; it must be 0, or from 2 to"),
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        SweepSettings(**changes)


def test_figures_need_both_minima_and_one_ridge():
    with pytest.raises(ValueError, match="inits is 'semantic'; it must have semantic and positional"):
        CurveSettings(inits="semantic")
    with pytest.raises(ValueError, match="ridges is '0.1,0.2'; it must be one number here"):
        CurveSettings(ridges="0.1,0.2")


def test_samples_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("ctxkern.experiments.positional.sweep.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="the samples of 2 seeds take .* GiB .*; lower seeds_at_once, d or alphas"):
        program()

"""State evolution: its pieces by other means, and its solutions against published experiments."""

import pytest
import torch
from torch.testing import assert_close

from ctxkern.experiments.positional import theory as module
from ctxkern.experiments.positional.published import LINEAR_ERRORS, POINTS, TRANSITIONS
from ctxkern.experiments.positional.theory import (
    Overlaps,
    Task,
    Theory,
    crossing,
    derivatives,
    follow,
    point_loss,
    proximal,
)

MATRIX = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=torch.float64)
TASK = Task(0.3, 0.01, 0.5, MATRIX)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def small():
    return Theory(TASK, 256)


@pytest.fixture(scope="module")
def large():
    return Theory(TASK, 1024)


def test_points_are_normal_and_signs_are_balanced():
    points = module._points(256)
    assert points.shape == (4, 1024)
    assert_close(points[0].sum(), torch.zeros(()).double())
    assert_close((points[0] * points[2]).sum(), torch.zeros(()).double())
    # worse than any quasi-random sequence: four standard errors
    assert abs(float(points.square().mean()) - 1) < 4 * (2 / 1024) ** 0.5


def test_the_loss_is_that_of_the_definition():
    theory, h = Theory(TASK, 4), drawn(2, 16)
    for n in range(16):
        semantic, own = (torch.softmax(each[:, None] * each, -1) for each in (theory.h_star[:, n], h[:, n]))
        target = 0.7 * semantic + 0.3 * MATRIX
        assert_close(theory.target[:, :, n], target)
        expected = 0.25 / 2 * (target - own).square().sum()
        assert_close(point_loss(h, theory.target, 0.5)[n], expected)


def test_derivatives_are_those_of_autograd():
    target, h = drawn(2, 2, 7, seed=1), drawn(2, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(point_loss(h, target, 0.5).sum(), h, create_graph=True)
    rows = [torch.autograd.grad(gradient[i].sum(), h, retain_graph=True)[0] for i in range(2)]
    found, hessian = derivatives(h.detach(), target, 0.5)
    assert_close(found, gradient.detach())
    assert_close(hessian, torch.stack([rows[0][0], rows[0][1], rows[1][1]]))


def test_proximal_points_are_minima(small):
    centre = drawn(2, small.h_star.shape[1], seed=3) / 2
    for variance in (0.1, 20.0):
        found = proximal(centre, small.target, variance, 0.5)
        gradient, (h11, h12, h22) = derivatives(found, small.target, 0.5)
        assert_close(found + variance * gradient, centre)
        trace, determinant = h11 + h22, h11 * h22 - h12.square()
        # I + V H has positive eigenvalues
        assert (1 + variance * trace + variance**2 * determinant > 0).all()
        assert (2 + variance * trace > 0).all()


def test_the_update_is_its_derivation(small):
    """V̂ by the derivative of f in place of Stein's identity, the rest by its formula."""
    alpha, at = 1.2, Overlaps(0.1, 0.3, 0.3, 10.0)
    centre, width = small._fresh(at)
    inside = proximal(centre, small.target, at.variance, 0.5)
    _, (h11, h12, h22) = derivatives(inside, small.target, 0.5)
    # −Tr H (I + V H)⁻¹
    v = at.variance
    trace, determinant = h11 + h22, h11 * h22 - h12.square()
    slopes = -(trace + 2 * v * determinant) / (1 + v * trace + v**2 * determinant)
    f = (inside - centre) / v
    stein = (small.noise * f).sum(0) / (0.5 * width)
    spread = float((stein - slopes).std()) / len(slopes) ** 0.5
    assert abs(float((stein - slopes).mean())) < 4 * spread
    new = small.update(alpha, at)
    v_hat = -alpha * 0.25 * float(stein.mean())
    assert new.variance == pytest.approx(0.25 / (0.01 + v_hat))
    assert new.m == pytest.approx(alpha * float((f[0] - f[1]).mean()) / (0.01 + v_hat))
    theta_hat = alpha * float((small.h_star * f).sum(0).mean()) + 0.3 * v_hat
    assert new.theta == pytest.approx(theta_hat / (0.01 + v_hat))
    q_hat = alpha * 0.25 * float(f.square().sum(0).mean())
    assert new.norm == pytest.approx(q_hat / (0.01 + v_hat) ** 2 + new.m**2 + new.theta**2)


def test_minima_are_the_published_ones(large):
    """Within two standard deviations of a seed."""
    starts = {"positional": Overlaps(0.25, 0, 0.175, 16.5), "semantic": Overlaps(0, 0.385, 0.274, 21.3)}
    for branch, start in starts.items():
        found = large.solve(1.005, start)
        at, again = found.overlaps, large.update(1.005, found.overlaps)
        for name in ("m", "theta", "norm", "variance"):
            assert getattr(again, name) == pytest.approx(getattr(at, name), rel=3e-3, abs=3e-3)
        values = found.test_error, 1000 * found.train_error, abs(at.m), abs(at.theta)
        own = 3 if branch == "semantic" else 2
        for number in (0, 1, own):
            mean, spread = POINTS[branch][1.005][number]
            assert abs(values[number] - mean) < 2 * spread
        # the other overlap is zero by symmetry
        assert values[5 - own] < 1e-9


def test_training_errors_cross_where_published(large):
    gap = []
    for alpha in (1.1, 1.4):
        positional = large.solve(alpha, Overlaps(0.25, 0, 0.187, 15.0))
        semantic = large.solve(alpha, Overlaps(0, 0.47, 0.325, 18.3))
        gap.append(positional.train_error - semantic.train_error)
    assert abs(crossing((1.1, 1.4), gap) - TRANSITIONS[0.3]) < 0.05


def test_a_branch_is_followed_as_far_as_it_goes(monkeypatch):
    """By steps of at most 0.1, halved where nothing is found, from the side where the branch is."""
    asked = []

    def solve(self, alpha, start):
        asked.append(round(alpha, 3))
        if alpha < 0.7 or (alpha < 0.75 and len(asked) < 5):
            raise module.NoSolutionError
        return module.Solution(alpha, Overlaps(0, 0.5 if alpha > 0.72 else 0.001, 0.3, 9.0), 1.0, 0.1)

    monkeypatch.setattr(Theory, "solve", solve)
    found = follow(Theory(TASK, 4), "semantic", (0.5, 0.73, 0.9))
    assert [None if one is None else one.alpha for one in found] == [None, 0.73, 0.9]
    assert asked[:5] == [0.9, 0.8, 0.73, 0.75, 0.73]


def test_a_branch_begins_at_the_first_solution(monkeypatch):
    def solve(self, alpha, start):
        if alpha < 0.2:
            raise module.NoSolutionError
        return module.Solution(alpha, Overlaps(0.3 if alpha > 0.25 else 0.0, 0, 0.3, 9.0), 1.0, 0.1)

    monkeypatch.setattr(Theory, "solve", solve)
    reports = []
    found = follow(Theory(TASK, 4), "positional", (0.1, 0.22, 0.3, 0.35), lambda: reports.append(1))
    assert [None if one is None else one.alpha for one in found] == [None, None, 0.3, 0.35]
    assert len(reports) == 4


@pytest.mark.parametrize("omega", sorted(LINEAR_ERRORS))
def test_the_linear_error_is_the_published_one(omega):
    theory = Theory(Task(omega, 0.01, 0.5, MATRIX), 4096)
    assert theory.linear_error() == pytest.approx(LINEAR_ERRORS[omega], rel=2e-3)


def test_crossings():
    nan = float("nan")
    assert crossing((0, 1, 2), (-1, 1, 3)) == 0.5
    assert crossing((0, 1, 2, 3), (nan, -1, nan, 3)) == 1.5
    assert crossing((0, 1), (1, 2)) is None
    assert crossing((0, 1, 2, 3, 4), (-1, 1, -1, 1, 1)) == 2.5

"""The limit of large d at n = α d: fixed-point equations for the overlaps of the two minima, and their errors.

Replica-symmetric theory of a ridge-regularised minimiser, as in arXiv 2402.03902, for L = 2, a student of rank 1 and
tokens from N(0, σ² I). Up to terms that vanish with d, a sample's loss is

    ℓ(h*, h) = σ² / 2 ‖T(h*) − S(h)‖²,     S_l = (a_l, 1 − a_l),  a_l = sigmoid(h_l (h_1 − h_2)),  h [2]

with the teacher's T = (1 − ω) S(h*) + ω A. A student has m = 1·Q / d, θ = q*·Q / d, q = ‖Q‖² / d; V is the variance
that its h has left within the training set. With independent ĝ_l, ζ_l from N(0, 1), s = (1, −1):

    h*_l = σ ĝ_l,    ω_l = s_l m + σ (θ ĝ_l + √(q − θ²) ζ_l)           h of a sample that is not in the training set
    h = argmin_h ‖h − ω‖² / (2 V) + ℓ(h*, h),    f = (h − ω) / V       h of one that is (Moreau)

    m̂ = α E Σ_l s_l f_l        V̂ = −α σ² E Σ_l ∂f_l / ∂ω_l = −α σ E Σ_l ζ_l f_l / √(q − θ²)   (Stein)
    q̂ = α σ² E Σ_l f_l²        θ̂ = α E Σ_l h*_l f_l + θ V̂
    m = m̂ / (λ + V̂),  θ = θ̂ / (λ + V̂),  q = (q̂ + m̂² + θ̂²) / (λ + V̂)²,  V = σ² / (λ + V̂)

The last row is the minimum of λ/2 ‖Q‖² + V̂/2 ‖Q‖² − (√q̂ g + m̂ 1 + θ̂ q*)·Q with g from N(0, I). The training error
is d (α E ℓ(h*, h) + λ q / 2), the test error E ℓ(h*, ω). Expectations are means over a
quasi-random sequence of (ĝ, ζ): where ‖h − ω‖² / (2 V) + ℓ has two minima, f jumps, and quadratures converge no faster.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BRANCHES = ("semantic", "positional")
_POINTS = 2048
_TOLERANCE, _ACCEPTED = 1e-6, 3e-3
_WARM_STEPS = 40
_STEP = 1e-3
_NEWTON_STEPS, _PROXIMAL_STEPS = 10, 60
_ALPHA_STEP, _LEAST_STEP = 0.1, 0.04
_VANISHED = 0.02


class NoSolutionError(ValueError):
    """The iteration did not settle."""


@dataclass(frozen=True)
class Task:
    """A teacher, and the student's λ."""

    omega: float
    ridge: float
    sigma: float
    matrix: Tensor


@dataclass(frozen=True)
class Overlaps:
    """What describes a minimum: m, θ, q = ‖Q‖² / d and V."""

    m: float
    theta: float
    norm: float
    variance: float


@dataclass(frozen=True)
class Solution:
    """A minimum at α. `train_error` is divided by d, λ's part included; `test_error` is per sample."""

    alpha: float
    overlaps: Overlaps
    train_error: float
    test_error: float


def _points(count: int) -> Tensor:
    """Points [4, 4 · count] of the standard normal law, by a Sobol sequence of a fixed seed.

    Each comes with its first two, its last two and all entries reversed, so that m = 0 and θ = 0 stay what they are
    where they are by symmetry.
    """
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(count, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-15, 1 - 1e-15))
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, 1, 1], [1, 1, -1, -1], [-1, -1, -1, -1]], dtype=torch.float64)
    return (signs[:, None] * normal).reshape(-1, 4).T.contiguous()


def attention(h: Tensor) -> Tensor:
    """a [2, N] of h [2, N]."""
    return torch.sigmoid(h * (h[0] - h[1]))


def teacher(h: Tensor, task: Task) -> Tensor:
    """T [2 (row), 2, N] of h* [2, N]."""
    a = attention(h)
    return (1 - task.omega) * torch.stack([a, 1 - a], 1) + task.omega * task.matrix[:, :, None]


def point_loss(h: Tensor, target: Tensor, sigma: float) -> Tensor:
    """ℓ [N] of h [2, N] and T [2, 2, N]."""
    a = attention(h)
    return sigma**2 / 2 * ((target[:, 0] - a).square() + (target[:, 1] - 1 + a).square()).sum(0)


def derivatives(h: Tensor, target: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(∇ℓ [2, N], its Hessian [3, N]: 11, 12, 22) at h [2, N]."""
    first, second = h
    a = attention(h)
    spread = a * (1 - a)
    k = 2 * a - target[:, 0] - 1 + target[:, 1]
    # by u_l = h_l (h_1 − h_2)
    v = sigma**2 * k * spread
    c = sigma**2 * spread * (2 * spread + k * (1 - 2 * a))
    slope = torch.stack([torch.stack([2 * first - second, -first]), torch.stack([second, first - 2 * second])])
    gradient = (v[:, None] * slope).sum(0)
    h11 = (c * slope[:, 0].square()).sum(0) + 2 * v[0]
    h12 = (c * slope[:, 0] * slope[:, 1]).sum(0) - v[0] + v[1]
    h22 = (c * slope[:, 1].square()).sum(0) - 2 * v[1]
    return gradient, torch.stack([h11, h12, h22])


def proximal(centre: Tensor, target: Tensor, variance: float, sigma: float, start: Tensor | None = None) -> Tensor:
    """argmin_h ‖h − centre‖² / (2 V) + ℓ(h), the minimum that Newton's method reaches from `start`; all [2, N].

    Steps go downhill: the Hessian is shifted where it is not positive, and a step is halved until the objective falls.
    """

    def objective(h: Tensor) -> Tensor:
        return (h - centre).square().sum(0) / 2 + variance * point_loss(h, target, sigma)

    h = (centre if start is None else start).clone()
    value = objective(h)
    for _ in range(_PROXIMAL_STEPS):
        gradient, (h11, h12, h22) = derivatives(h, target, sigma)
        force = h - centre + variance * gradient
        if float(force.abs().max()) < 1e-12:
            break
        j11, j12, j22 = 1 + variance * h11, variance * h12, 1 + variance * h22
        least = (j11 + j22) / 2 - torch.hypot((j11 - j22) / 2, j12)
        shift = (0.05 - least).clamp_min(0)
        j11, j22 = j11 + shift, j22 + shift
        determinant = j11 * j22 - j12.square()
        step = torch.stack([j22 * force[0] - j12 * force[1], j11 * force[1] - j12 * force[0]]) / determinant
        share = torch.ones_like(value)
        for _ in range(30):
            fresh = objective(h - share * step)
            # rounding may lift the objective at the minimum
            worse = fresh > value + 1e-14
            if not worse.any():
                break
            share[worse] /= 2
        h, value = h - share * step, fresh
    return h


class Theory:
    """The fixed points of one task.

    Args:
        task: the teacher, σ and λ.
        points: of the sequence; four times as many are used.
    """

    def __init__(self, task: Task, points: int = _POINTS):
        self.task = task
        self.teacher_noise, self.noise = _points(points).split(2)
        self.h_star = task.sigma * self.teacher_noise
        self.target = teacher(self.h_star, task)

    def _mean(self, values: Tensor) -> float:
        return float(values.mean())

    def _fresh(self, at: Overlaps) -> tuple[Tensor, float]:
        """(ω [2, N], √(q − θ²))."""
        width = math.sqrt(max(at.norm - at.theta**2, 1e-300))
        shift = torch.tensor([[at.m], [-at.m]], dtype=torch.float64)
        return shift + self.task.sigma * (at.theta * self.teacher_noise + width * self.noise), width

    def update(self, alpha: float, at: Overlaps) -> Overlaps:
        """The right-hand sides of the equations."""
        sigma, ridge = self.task.sigma, self.task.ridge
        centre, width = self._fresh(at)
        inside = proximal(centre, self.target, at.variance, sigma)
        f = (inside - centre) / at.variance
        v_hat = -alpha * sigma / width * self._mean((self.noise * f).sum(0))
        m_hat = alpha * self._mean(f[0] - f[1])
        theta_hat = alpha * self._mean((self.h_star * f).sum(0)) + at.theta * v_hat
        q_hat = alpha * sigma**2 * self._mean(f.square().sum(0))
        total = ridge + v_hat
        m, theta = m_hat / total, theta_hat / total
        return Overlaps(m, theta, q_hat / total**2 + m**2 + theta**2, sigma**2 / total)

    def solve(self, alpha: float, start: Overlaps) -> Solution:
        """The fixed point next to `start`.

        Newton's method, as the plain iteration is unstable on some of them; where it gets stuck, damped steps of the
        iteration and Newton's method again. The means jump where a point of the sequence goes from one minimum of its
        own to another, so that residuals of up to `_ACCEPTED` (in m, θ, log (q − θ²), log V) are taken for zero.

        Raises:
            NoSolutionError: none is found.
        """
        best = self._newton(alpha, _coordinates(start))
        if best[0] > _TOLERANCE:
            at = start
            for _ in range(_WARM_STEPS):
                new = self.update(alpha, at)
                if not _is_sound(new):
                    break
                at = Overlaps(*((a + b) / 2 for a, b in zip(_values(at), _values(new), strict=True)))
            best = min(best, self._newton(alpha, _coordinates(at)), key=lambda each: each[0])
        if best[0] > _ACCEPTED:
            raise NoSolutionError(f"alpha is {alpha:g}, where no solution for omega = {self.task.omega:g} was found")
        return self.measure(alpha, _overlaps(best[1]))

    def _newton(self, alpha: float, x: Tensor) -> tuple[float, Tensor]:
        """(the least residual met, where)."""
        gap = self._gap(alpha, x)
        best = float(gap.abs().max()), x
        for _ in range(_NEWTON_STEPS):
            if best[0] < _TOLERANCE:
                break
            columns = [(self._gap(alpha, x + shift) - gap) / _STEP for shift in _STEP * torch.eye(4).double()]
            step = torch.linalg.lstsq(torch.stack(columns, 1), gap[:, None]).solution[:, 0].clamp(-0.3, 0.3)
            for share in (1.0, 0.5, 0.2, 0.05):
                fresh = self._gap(alpha, x - share * step)
                if fresh.abs().max() < gap.abs().max():
                    break
            else:
                break
            x, gap = x - share * step, fresh
            best = float(gap.abs().max()), x
        return best

    def _gap(self, alpha: float, x: Tensor) -> Tensor:
        new = self.update(alpha, _overlaps(x))
        return _coordinates(new) - x if _is_sound(new) else torch.full((4,), 1e3, dtype=torch.float64)

    def measure(self, alpha: float, at: Overlaps) -> Solution:
        """The errors of a minimum."""
        sigma = self.task.sigma
        centre, _ = self._fresh(at)
        inside = point_loss(proximal(centre, self.target, at.variance, sigma), self.target, sigma)
        train = alpha * self._mean(inside) + self.task.ridge / 2 * at.norm
        return Solution(alpha, at, train, self._mean(point_loss(centre, self.target, sigma)))

    def linear_error(self) -> float:
        """The test error of the best matrix [2, 2] in place of the student's attention."""
        spread = self.target.square().mean(-1) - self.target.mean(-1).square()
        return self.task.sigma**2 / 2 * float(spread.sum())


def follow(
    theory: Theory, branch: str, alphas: Sequence[float], report: Callable[[], object] = lambda: None
) -> list[Solution | None]:
    """The solutions of a branch at each of `alphas`, ascending; None where there is none.

    The semantic branch is followed from large α down, the positional one from small α up: each solution is the start of
    the next, in steps that halve where none is found. It begins at the first of them that has one, and ends where the
    overlap that names it has vanished.
    """
    down = branch == "semantic"
    start = Overlaps(0, 0.6, 0.45, 12) if down else Overlaps(0.2, 0, 0.12, 20)
    found: list[Solution | None] = [None] * len(alphas)
    numbers = range(len(alphas) - 1, -1, -1) if down else range(len(alphas))
    solution: Solution | None = None
    for number in numbers:
        reached = _reach(theory, solution, start, alphas[number])
        report()
        if reached is not None and abs(reached.overlaps.theta if down else reached.overlaps.m) >= _VANISHED:
            found[number] = solution = reached
        elif solution is not None:
            break
    return found


def _reach(theory: Theory, last: Solution | None, start: Overlaps, alpha: float) -> Solution | None:
    """The solution at `alpha` by steps from the last one, or from `start` where there is none yet."""
    if last is None:
        with contextlib.suppress(NoSolutionError):
            return theory.solve(alpha, start)
        return None
    step = math.copysign(_ALPHA_STEP, alpha - last.alpha)
    while last.alpha != alpha:
        place = alpha if abs(alpha - last.alpha) <= abs(step) else last.alpha + step
        try:
            last = theory.solve(place, last.overlaps)
        except NoSolutionError:
            step /= 2
            if abs(step) < _LEAST_STEP:
                return None
    return last


def crossing(alphas: Sequence[float], gaps: Sequence[float]) -> float | None:
    """Where the gaps, nan left out, turn from negative to positive for the last time, by straight lines between."""
    known = [(alpha, gap) for alpha, gap in zip(alphas, gaps, strict=True) if math.isfinite(gap)]
    found = None
    for (low, before), (high, after) in itertools.pairwise(known):
        if before < 0 <= after:
            found = low - before * (high - low) / (after - before)
    return found


def _values(at: Overlaps) -> tuple[float, ...]:
    return at.m, at.theta, at.norm, at.variance


def _is_sound(at: Overlaps) -> bool:
    return all(map(math.isfinite, _values(at))) and at.variance > 0 and at.norm > at.theta**2


def _coordinates(at: Overlaps) -> Tensor:
    """What Newton's method moves: m, θ and the logarithms of q − θ² and V."""
    return torch.tensor([at.m, at.theta, math.log(at.norm - at.theta**2), math.log(at.variance)], dtype=torch.float64)


def _overlaps(x: Tensor) -> Overlaps:
    m, theta, rest, variance = x.tolist()
    return Overlaps(m, theta, math.exp(rest) + theta**2, math.exp(variance))

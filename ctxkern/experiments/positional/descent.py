"""Gradient descent of many students at once, in closed form.

With u = x + p and h = u Q / √d [2, r], row l of the student's attention is (a_l, 1 − a_l), a_l = sigmoid(h_l · δ),
δ = h_1 − h_2. So a sample's loss depends on Q through h alone, and otherwise on products of its tokens that are
computed once:

    loss = Σ_l (a_l² g − 2 a_l b_l) / 2 + const,    w = u_1 − u_2,  g = w·w / d,  b_l = (y_l − u_2)·w / d
    v_l  = ∂loss / ∂(h_l · δ) = (a_l g − b_l) a_l (1 − a_l)
    ∂loss / ∂h_1 = v_1 δ + (v_1 h_1 + v_2 h_2),     ∂loss / ∂h_2 = v_2 δ − (v_1 h_1 + v_2 h_2)
    ∂loss / ∂Q = Σ u ᵀ (∂loss / ∂h) / √d

A step is two products with the data u [2 n, d] and some twenty elementwise operations on [2 n]. Experiments that share
data are rows of one factor, so that the data is read for all of them together: initialisations, λ, ω (which changes
b alone) and α, since the samples at a smaller α are the first ones of those at a larger one. Seeds, which share
nothing, are the batch of the products.

Count for one seed with C columns (experiments times rank) at each α and n_α = α d samples: the products take
16 C d Σ_α n_α operations a step, on 8 n_max d bytes of float32 data, as the second product finds a block in the cache.
One experiment alone has 16 n d operations for at least 8 n d bytes: 2 a byte, which memory limits. The 26 columns of
the figure at ω = 0.3 have 28 a byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxkern.experiments.positional.definition import positions

# samples of a block: its rows stay in the cache between the two products
BLOCK = 256


@dataclass
class Block:
    """Samples of S seeds, and what is computed of them once.

    Attributes:
        rows: [S, 2 · n, d], (x + p) / √d, all first tokens before all second ones.
        gate: [S, 2, n], the teacher's semantic attention: from each token to the first.
        gram: [S, 5, n], x_1·x_1, x_1·x_2, x_2·x_2, x_1·p_1, x_2·p_1, all / d.
    """

    rows: Tensor
    gate: Tensor
    gram: Tensor

    @property
    def samples(self) -> int:
        """How many of each seed."""
        return self.gate.shape[-1]


def make_block(x: Tensor, q_star: Tensor) -> Block:
    """Of x [S, n, 2, d] and q* [S, d]."""
    width = x.shape[-1]
    h = torch.einsum("snld,sd->sln", x, q_star) / width**0.5
    gate = torch.sigmoid(h * (h[:, :1] - h[:, 1:]))
    first, second = x.unbind(2)
    place = positions(x)
    pairs = [(first * first).sum(-1), (first * second).sum(-1), (second * second).sum(-1)]
    gram = torch.stack([*pairs, first @ place[0], second @ place[0]], 1) / width
    rows = ((x + place) / width**0.5).transpose(1, 2).flatten(1, 2).contiguous()
    return Block(rows, gate, gram)


@dataclass
class Targets:
    """What the loss of a block needs for each ω; [S, 1, W, 1, 2, n] and, of g, [S, 1, 1, 1, 1, n]."""

    first: Tensor  # the teacher's attention to the first token
    second: Tensor
    b: Tensor
    g: Tensor
    gram: Tensor


def make_targets(block: Block, omegas: Tensor, matrix: Tensor) -> Targets:
    """Of ω [W] and A [2, 2]."""
    gate = block.gate[:, None, :, :]
    weight = omegas[None, :, None, None]
    # [S, W, 2, n]
    first = (1 - weight) * gate + weight * matrix[:, 0, None]
    second = (1 - weight) * (1 - gate) + weight * matrix[:, 1, None]
    x11, x12, x22, p1, p2 = (one[:, None, None, :] for one in block.gram.unbind(1))
    p11 = 1 / block.rows.shape[-1]
    # x_k · w, u_2 · w and w · w, where w = x_1 − x_2 + 2 p_1 and u_2 = x_2 − p_1
    with_first, with_second = x11 - x12 + 2 * p1, x12 - x22 + 2 * p2
    with_base = with_second - (p1 - p2 + 2 * p11)
    b = first * with_first + second * with_second - with_base
    g = x11 - 2 * x12 + x22 + 4 * (p1 - p2) + 4 * p11
    first, second, b, g = (one[:, None, :, None] for one in (first, second, b, g))
    return Targets(first, second, b, g, block.gram)


def attention(h: Tensor) -> Tensor:
    """a [..., 2, n] of h [..., r, 2, n]."""
    difference = h[..., :1, :] - h[..., 1:, :]
    return torch.sigmoid((h * difference).sum(-3))


def slopes(h: Tensor, targets: Targets) -> Tensor:
    """∂loss / ∂h of every sample, [S, G, W, M, r, 2, n] as h is."""
    difference = h[..., 0, :] - h[..., 1, :]
    products = h * difference.unsqueeze(-2)
    a = torch.sigmoid(products.squeeze(-3) if h.shape[-3] == 1 else products.sum(-3))
    v = torch.addcmul(-targets.b, a, targets.g)
    v.mul_(a).mul_(1 - a)
    v = v.unsqueeze(-3)
    shared = torch.mul(v, h, out=products).sum(-2)
    out = v * difference.unsqueeze(-2)
    out[..., 0, :] += shared
    out[..., 1, :] -= shared
    return out


def errors(a: Tensor, targets: Targets) -> Tensor:
    """The loss of each sample [S, G, W, M, n] of attention a [S, G, W, M, 2, n], without λ.

    As a quadratic form in the differences between the two attentions, which loses no digits.
    """
    first, second = targets.first - a, targets.second - (1 - a)
    return _quadratic(first, second, 2 * a - 1, targets)


def _quadratic(first: Tensor, second: Tensor, place: Tensor | None, targets: Targets) -> Tensor:
    """Σ_l ‖first_l x_1 + second_l x_2 − place_l p_1‖² / (2 d)."""
    x11, x12, x22, p1, p2 = (one[:, None, None, None, None, :] for one in targets.gram.unbind(1))
    total = first.square() * x11 + second.square() * x22 + 2 * first * second * x12
    if place is not None:
        # ‖p_1‖² / d is g less its other parts
        p11 = (targets.g - (x11 - 2 * x12 + x22 + 4 * (p1 - p2))) / 4
        total = total + place.square() * p11 - 2 * place * (first * p1 + second * p2)
    return total.sum(-2) / 2


class Descent:
    """All experiments of some seeds that share data: seeds [S], samples [G], ω [W] and M of the rest.

    Args:
        x: [S, n_max, 2, d]; the first `counts[i]` samples of a seed are those of experiments at i.
        q_star: [S, d].
        counts: [G] numbers of samples, ascending.
        omegas: [W].
        matrix: A [2, 2].
        query: [S, G, W, M, r, d], the students' first Q, transposed; it is changed in place.
        ridges: [M], λ.
        lr: learning rate.
        held: [M, n_max] of bool or None: samples that an experiment does not learn from.
    """

    def __init__(
        self,
        x: Tensor,
        q_star: Tensor,
        counts: Sequence[int],
        omegas: Tensor,
        matrix: Tensor,
        query: Tensor,
        ridges: Tensor,
        lr: float,
        held: Tensor | None = None,
    ):
        self.query, self.ridges, self.lr, self.counts = query, ridges, lr, list(counts)
        self._flat = query.view(len(query), -1, query.shape[-1])
        self._gradient = torch.zeros_like(self._flat)
        self._decay = (1 - lr * ridges)[:, None, None].expand(query.shape[1:-1] + (1,)).reshape(-1, 1)
        self._parts: list[tuple[int, Block, Targets, Tensor | None]] = []
        start = 0
        for group, end in enumerate(self.counts):
            while start < end:
                stop = min(start + BLOCK, end)
                block = make_block(x[:, start:stop], q_star)
                part = None if held is None else (~held[:, start:stop]).to(x.dtype)[:, None, None, :]
                self._parts.append((group, block, make_targets(block, omegas, matrix), part))
                start = stop

    def _heads(self, group: int, block: Block) -> Tensor:
        """h [S, G − group, W, M, r, 2, n] of the experiments that learn from the block."""
        active = self.query[:, group:]
        flat = self._flat[:, self._first(group) :]
        return torch.bmm(flat, block.rows.mT).view(*active.shape[:-1], 2, block.samples)

    def _first(self, group: int) -> int:
        return group * (self._flat.shape[1] // len(self.counts))

    def samples(self) -> list[tuple[int, Block, Targets]]:
        """The training samples by blocks, each with the first number in `counts` that it belongs to."""
        return [(group, block, targets) for group, block, targets, _ in self._parts]

    def gradient(self) -> Tensor:
        """∂Σ loss / ∂Q without λ, [S, G · W · M · r, d]; overwritten by the next call."""
        self._gradient.zero_()
        for group, block, targets, part in self._parts:
            slope = slopes(self._heads(group, block), targets)
            if part is not None:
                slope *= part
            self._gradient[:, self._first(group) :].baddbmm_(slope.flatten(-2).flatten(1, -2), block.rows)
        return self._gradient

    def step(self) -> None:
        """One step of gradient descent."""
        gradient = self.gradient()
        self._flat.mul_(self._decay).add_(gradient, alpha=-self.lr)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Sums of the loss, without λ, over the samples that are learnt from and over those held out, [S, G, W, M]."""
        learnt = torch.zeros(self.query.shape[:4], dtype=torch.float64, device=self.query.device)
        kept = torch.zeros_like(learnt)
        for group, block, targets, part in self._parts:
            each = errors(attention(self._heads(group, block)), targets).double()
            weight = torch.ones((), device=each.device) if part is None else part[:, 0, 0]
            learnt[:, group:] += (each * weight).sum(-1)
            kept[:, group:] += (each * (1 - weight)).sum(-1)
        return learnt, kept

    def penalty(self) -> Tensor:
        """λ / 2 ‖Q‖², [S, G, W, M]."""
        return self.query.double().square().sum((-2, -1)) * self.ridges.double() / 2


def fit_linear(blocks: Sequence[tuple[int, Block, Targets]], groups: int, ridge: float) -> Tensor:
    """The linear baseline B [S, G, W, 2, 2] on x without positions: least Σ ‖y − B x‖² / (2 d) + ridge / 2 ‖B‖²."""
    _, block, targets = blocks[0]
    seeds, width = len(block.gate), targets.first.shape[2]
    like = {"dtype": torch.float64, "device": block.gate.device}
    gram = torch.zeros(seeds, groups, 1, 2, 2, **like)
    cross = torch.zeros(seeds, groups, width, 2, 2, **like)
    for group, _, one in blocks:
        x11, x12, x22 = one.gram[:, :3].double().unbind(1)
        pairs = torch.stack([x11, x12, x12, x22], 1)
        gram[:, group:] += pairs.sum(-1).view(seeds, 1, 1, 2, 2)
        shares = torch.stack([one.first, one.second], -2).double()[:, 0, :, 0]
        # [S, W, 2 (row), 2 (teacher's token), n] with the products of x
        cross[:, group:] += torch.einsum("swlkn,skjn->swlj", shares, pairs.view(seeds, 2, 2, -1))[:, None]
    gram = gram + ridge * torch.eye(2, **like)
    return torch.linalg.solve(gram, cross.mT).mT


def linear_errors(baseline: Tensor, targets: Targets) -> Tensor:
    """The loss of each sample [S, G, W, n] of B [S, G, W, 2, 2]."""
    baseline = baseline.to(targets.first.dtype)[:, :, :, None, :, :, None]
    first, second = targets.first - baseline[..., 0, :], targets.second - baseline[..., 1, :]
    return _quadratic(first, second, None, targets)[:, :, :, 0]

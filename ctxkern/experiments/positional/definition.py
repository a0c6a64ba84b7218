"""Teacher, student and loss as they are defined: the specification, which every faster form is tested against.

A sample x [2, d] has two tokens with entries from N(0, σ²). With q* [d] and Q [d, r]:

    teacher  y = [(1 − ω) softmax(h hᵀ) + ω A] x,            h = x q* / √d                 [2]
    student  f = softmax((x + p) Q Qᵀ (x + p)ᵀ / d) (x + p),  p = (1_d, −1_d) / √d          [2, d]
    loss     Σ_samples ‖f − y‖² / (2 d)  +  λ / 2 ‖Q‖²

Plain tensors of any dtype, differentiable; x may have leading dimensions.
"""

import torch
from torch import Tensor

TOKENS = 2


def positions(x: Tensor) -> Tensor:
    """p [2, d], in the dtype and on the device of x."""
    one = torch.full((x.shape[-1],), x.shape[-1] ** -0.5, dtype=x.dtype, device=x.device)
    return torch.stack([one, -one])


def teacher(x: Tensor, q_star: Tensor, omega: float, matrix: Tensor) -> Tensor:
    """y [..., 2, d] of x [..., 2, d], with q* [d] and A [2, 2]."""
    h = x @ q_star / x.shape[-1] ** 0.5
    semantic = torch.softmax(h[..., :, None] * h[..., None, :], -1)
    return ((1 - omega) * semantic + omega * matrix) @ x


def student(x: Tensor, query: Tensor) -> Tensor:
    """f [..., 2, d] of x [..., 2, d], with Q [d, r]."""
    placed = x + positions(x)
    h = placed @ query
    return torch.softmax(h @ h.mT / x.shape[-1], -1) @ placed


def loss(x: Tensor, target: Tensor, query: Tensor, ridge: float = 0.0) -> Tensor:
    """The loss of samples x and targets [n, 2, d], summed over them, with `ridge` for λ."""
    errors = (student(x, query) - target).square().sum() / (2 * x.shape[-1])
    return errors + ridge / 2 * query.square().sum()


def descend(x: Tensor, target: Tensor, query: Tensor, *, ridge: float, lr: float, steps: int) -> Tensor:
    """Q after `steps` of full-batch gradient descent on `loss`, one experiment, by autograd."""
    query = query.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([query], lr=lr, weight_decay=ridge)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x, target, query).backward()
        optimizer.step()
    return query.detach()

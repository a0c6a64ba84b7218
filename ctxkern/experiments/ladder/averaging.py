"""Four steps from the mean of what came before to a head of attention.

A token may know of the tokens before it, itself included, and of none after it. The simplest thing to tell it is their
mean, y[b, t] = mean over i ≤ t of x[b, i]. `mean_by_loop` computes that as it is said; `mean_by_matrix` as one product
with a triangular matrix of weights that sum to 1 in each row; `mean_by_softmax` makes these weights from scores, all
zero, where later tokens are masked by −∞. `head` puts scores in place of the zeros that depend on the tokens
themselves: that is attention.
"""

import torch
import torch.nn.functional as F


def mean_by_loop(x: torch.Tensor) -> torch.Tensor:
    """v1. The mean of each token and those before it.

    Args:
        x: [B, T, C].

    Returns:
        [B, T, C].
    """
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[b, t] = x[b, : t + 1].mean(0)
    return y


def mean_by_matrix(x: torch.Tensor) -> torch.Tensor:
    """v2. The same by one product: row t of a lower triangular matrix holds 1 / (t + 1) up to column t.

    Args:
        x: [B, T, C].

    Returns:
        [B, T, C].
    """
    weights = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device))
    weights = weights / weights.sum(1, keepdim=True)
    # [T, T] @ [B, T, C]: torch repeats the matrix over the batch
    return weights @ x


def mean_by_softmax(x: torch.Tensor) -> torch.Tensor:
    """v3. The same, with weights that are the softmax of scores: zeros, and −∞ for what comes later.

    Args:
        x: [B, T, C].

    Returns:
        [B, T, C].
    """
    return causal_softmax(torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)) @ x


def head(
    x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaled: bool = True
) -> torch.Tensor:
    """v4. One head of attention: the score of a pair of tokens is the product of the query of one and the key of the
    other, and what is averaged are values.

    Args:
        x: [B, T, C].
        query, key, value: [C, H], used as x @ query.
        scaled: whether scores are divided by √H, without which the softmax picks one token where H is large.

    Returns:
        [B, T, H].
    """
    scores = (x @ query) @ (x @ key).mT
    if scaled:
        scores = scores * query.shape[1] ** -0.5
    return causal_softmax(scores) @ (x @ value)


def causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Weights [..., T, T] of scores of the same shape: each row sums to 1, and is zero for later tokens."""
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return F.softmax(scores.masked_fill(later, float("-inf")), dim=-1)


def example() -> torch.Tensor:
    """The tokens [4, 8, 2] of the printed example, drawn under seed 1337."""
    return torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(1337))


def triangular_example() -> tuple[torch.Tensor, torch.Tensor]:
    """A lower triangular matrix of ones [3, 3], and integers [3, 2], drawn under seed 1667, whose rows it adds up."""
    numbers = torch.randint(1, 10, (3, 2), generator=torch.Generator().manual_seed(1667)).float()
    return torch.tril(torch.ones(3, 3)), numbers

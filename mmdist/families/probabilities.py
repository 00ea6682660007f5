"""Convert the scores of a head to probabilities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fp32(x: Tensor) -> Tensor:
    """Cast to at least fp32: half precision rounds small probabilities away."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_min_score(min_score: float) -> None:
    """Raise ValueError unless 0 <= min_score < 1."""
    if not 0 <= min_score < 1:
        raise ValueError(
            f'`min_score` must satisfy 0 <= min_score < 1, got {min_score}.'
        )


def foreground(scores: Tensor, activation: str, dim: int = 1) -> Tensor:
    """Probabilities of the classes without background, in at least fp32.

    Args:
        scores: Scores, with the classes along ``dim``.
        activation: What turns them into probabilities. For ``'softmax'``, the last
            column is the background.
        dim: The dimension of the classes.
    """
    scores = fp32(scores)
    if activation == 'softmax':
        return scores.softmax(dim).narrow(dim, 0, scores.size(dim) - 1)
    return scores.sigmoid() if activation == 'sigmoid' else scores


def mean_probability(a: Tensor, b: Tensor, activation: str, dim: int = 1) -> Tensor:
    """Scores whose probabilities are the mean of those of two, in at least fp32.

    All have the same shape and activation, and the classes along ``dim``.
    """
    a, b = fp32(a), fp32(b)
    if activation == 'identity':
        return (a + b) / 2
    if activation == 'softmax':
        both = torch.logaddexp(a.log_softmax(dim), b.log_softmax(dim))
        return both - math.log(2)
    # log-odds, which neither overflow nor round if a probability is almost 0 or 1
    yes, no = (
        torch.logaddexp(F.logsigmoid(sign * a), F.logsigmoid(sign * b))
        for sign in (1, -1)
    )
    return yes - no

"""The oracle of these tests: the published formula in numpy, float64."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, softmax


def is_constant(scores: np.ndarray, activation: str) -> np.ndarray:
    """Rows that have no relation, as the docstring of ``DISTLoss`` defines it."""
    size = np.abs(scores.mean(1))
    if activation != 'identity':
        size = np.minimum(size, np.maximum(1 - size, 1e-6))
    return scores.std(1) <= np.maximum(1e-6 * size, 1e-18)


def correlations(
    a: np.ndarray, b: np.ndarray, activation: str = 'identity', eps: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pearson correlation of each row of two (rows, classes) arrays, 0 for constants.

    Returns:
        The correlations, and two arrays whose difference is their gradient with respect
        to ``a``. They cancel where the correlation is 1.
    """
    constant = is_constant(a, activation) | is_constant(b, activation)
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm_a, norm_b = (np.linalg.norm(x, axis=1) + constant for x in (a, b))
    norms = norm_a * norm_b + eps
    corr = np.where(constant, 0, (a * b).sum(1) / norms)
    factor = np.where(constant, 0, 1 / norms)
    pull, push = b.T * factor, a.T * factor * corr * norm_b / norm_a
    return corr, pull.T, push.T


def scores(logits: np.ndarray, activation: str, tau: float = 1.0) -> np.ndarray:
    """(N, classes, ...) logits as (rows, classes) scores in float64."""
    logits = np.moveaxis(np.asarray(logits, np.float64), 1, -1)
    logits = logits.reshape(-1, logits.shape[-1]) / tau
    if activation == 'softmax':
        return softmax(logits, axis=1)
    return expit(logits) if activation == 'sigmoid' else logits


def value_and_gradient(
    student: np.ndarray,
    teacher: np.ndarray,
    activation: str = 'softmax',
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    scale_by_tau: bool = True,
    loss_weight: float = 1.0,
    eps: float = 0.0,
    mask: np.ndarray | None = None,
) -> tuple[float, np.ndarray, float]:
    """Loss, gradient by the student's logits, and its norm before its terms cancel."""
    s, t = scores(student, activation, tau), scores(teacher, activation, tau)
    keep = np.full(len(s), True) if mask is None else mask.reshape(-1)
    s, t = s[keep], t[keep]
    scale = loss_weight * (tau**2 if scale_by_tau else 1)

    def through_activation(grad: np.ndarray) -> np.ndarray:
        if activation == 'softmax':
            grad = s * (grad - (grad * s).sum(1, keepdims=True))
        elif activation == 'sigmoid':
            grad = grad * s * (1 - s)
        return -scale / tau * grad

    inter, *inter_terms = correlations(s, t, activation, eps)
    intra, *intra_terms = correlations(s.T, t.T, activation, eps)
    value = scale * (beta * (1 - inter.mean()) + gamma * (1 - intra.mean()))
    terms = [through_activation(beta / len(inter) * x) for x in inter_terms]
    terms += [through_activation(gamma / len(intra) * x.T) for x in intra_terms]
    size = sum(np.linalg.norm(x) for x in terms)

    grad = np.zeros((len(keep), s.shape[1]))
    grad[keep] = terms[0] - terms[1] + terms[2] - terms[3]
    shape = (student.shape[0], *student.shape[2:], student.shape[1])
    return value, np.moveaxis(grad.reshape(shape), -1, 1), size


def dist_loss(student: np.ndarray, teacher: np.ndarray, *args, **kwargs) -> float:
    return value_and_gradient(student, teacher, *args, **kwargs)[0]

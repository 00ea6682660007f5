"""The oracle of these tests: the published formula in numpy, float64."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, softmax


def correlations(a: np.ndarray, b: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """Pearson correlation of each row of two (rows, classes) arrays."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / (norms + eps)


def scores(logits: np.ndarray, activation: str, tau: float = 1.0) -> np.ndarray:
    """(N, classes, ...) logits as (rows, classes) scores in float64."""
    logits = np.moveaxis(np.asarray(logits, np.float64), 1, -1)
    logits = logits.reshape(-1, logits.shape[-1]) / tau
    if activation == 'softmax':
        return softmax(logits, axis=1)
    return expit(logits) if activation == 'sigmoid' else logits


def dist_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    activation: str = 'softmax',
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    scale_by_tau: bool = True,
    loss_weight: float = 1.0,
    mask: np.ndarray | None = None,
) -> float:
    s, t = scores(student, activation, tau), scores(teacher, activation, tau)
    if mask is not None:
        s, t = s[mask.reshape(-1)], t[mask.reshape(-1)]
    loss = beta * (1 - correlations(s, t).mean())
    loss += gamma * (1 - correlations(s.T, t.T).mean())
    return loss_weight * (tau**2 if scale_by_tau else 1) * loss


def gradient(student: np.ndarray, teacher: np.ndarray, **kwargs) -> np.ndarray:
    """Gradient of ``dist_loss`` by the student: central differences, 4th order."""
    student = np.array(student, np.float64)
    grad = np.zeros_like(student)
    h = 1e-3
    for i in np.ndindex(student.shape):
        x = student[i]
        for step, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            student[i] = x + step * h
            grad[i] += factor / (12 * h) * dist_loss(student, teacher, **kwargs)
        student[i] = x
    return grad

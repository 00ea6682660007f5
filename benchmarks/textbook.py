"""DIST written the obvious way, the baseline of `mmdist.DISTLoss`."""

from __future__ import annotations

from torch import Tensor


def cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)


def pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Correlation of each row of (rows, classes), equation 6 of the paper."""
    return cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), eps)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    activation: str = 'softmax',
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Equations 7 to 10 for logits of shape (rows, classes) or (N, classes, *spatial).

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        activation: ``'softmax'``, ``'sigmoid'`` or ``'identity'``.
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        tau: Temperature; its square multiplies the loss.
        eps: Added to the product of the norms; the default is the published code's.

    Returns:
        A 0-dim tensor.
    """
    student, teacher = (
        z.movedim(1, -1).reshape(-1, z.shape[1]) / tau for z in (student, teacher)
    )
    if activation == 'softmax':
        student, teacher = student.softmax(1), teacher.softmax(1)
    elif activation == 'sigmoid':
        student, teacher = student.sigmoid(), teacher.sigmoid()
    inter = 1 - pearson(student, teacher, eps).mean()
    intra = 1 - pearson(student.t(), teacher.t(), eps).mean()
    return tau**2 * (beta * inter + gamma * intra)

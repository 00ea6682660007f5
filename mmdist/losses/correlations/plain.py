"""The correlations as the paper writes them, in autograd.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher",
NeurIPS 2022 (arXiv 2205.10536), section 4, equations 6 to 9.

Everything is in fp32 (float64 for float64 logits). If rounding destroys what centring
leaves of a vector, its correlation has no correct digits. The other paths compute such
scores in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import (
    Settings,
    as_rows,
    check_teacher,
    compute_dtype,
    is_constant,
    sum_over_processes,
)

ACTIVATIONS = {
    'softmax': lambda logits: logits.softmax(dim=1),
    'sigmoid': torch.sigmoid,
    'identity': lambda logits: logits,
}


def correlations(
    student: Tensor, teacher: Tensor, mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See :func:`mmdist.losses.correlations.correlations`."""
    student, teacher = as_rows(student), as_rows(teacher.detach())
    dtype = compute_dtype(student, teacher)
    weight = None
    if mask is not None:
        weight = mask.reshape(-1, 1).to(dtype)
        # before any arithmetic: 0 * nan is nan, in the gradient as well
        student, teacher = (x.masked_fill(weight == 0, 0) for x in (student, teacher))
    check_teacher(teacher)
    student, teacher = (
        ACTIVATIONS[settings.activation](logits.to(dtype) / settings.tau)
        for logits in (student, teacher)
    )
    if settings.activation == 'identity' and settings.group is None:
        student, teacher = in_range(student), in_range(teacher)
    # inter-class, equation 7: processes share only the mean
    rows = pearson(student, teacher, 1, None, settings._replace(group=None))
    count = torch.ones_like(rows) if weight is None else weight.squeeze(1)
    sums = torch.stack([(count * rows).sum(), count.sum()])
    total, count = sum_over_processes(sums, settings.group)
    # intra-class, equation 9
    classes = pearson(student, teacher, 0, weight, settings)
    return total / count.clamp(min=1), classes.mean()


def in_range(scores: Tensor) -> Tensor:
    """Divide scores so that no square overflows, which changes no correlation.
    Ordinary scores are divided by 1."""
    if not scores.numel():
        return scores
    largest = torch.linalg.vector_norm(scores.detach(), math.inf)
    return scores / (largest / torch.finfo(scores.dtype).max ** 0.4).clamp(min=1)


def pearson(
    a: Tensor, b: Tensor, dim: int, weight: Tensor | None, settings: Settings
) -> Tensor:
    """Pearson correlation of two matrices along one dimension.

    It is ``sum(a * b) / (|a| * |b| + eps)`` after centring both. Where ``a`` or ``b``
    is constant (see ``MIN_SPREAD``), it and its gradient are 0.

    Args:
        a: Scores of shape (rows, classes), floating point.
        b: Scores of the same shape.
        dim: 0 for the correlation of each class, 1 for that of each row.
        weight: 1 where an entry counts and 0 where it does not, broadcastable to
            ``a``; ``None`` if all do. Entries of weight 0 must be finite.
        settings: How to correlate them.
    """
    if weight is None:
        weight = a.new_ones((1, 1))

    def total(*terms: Tensor) -> Tensor:
        sums = torch.stack([(weight * term).sum(dim) for term in terms])
        return sum_over_processes(sums, settings.group)

    count, sum_a, sum_b = total(torch.ones_like(a), a, b)
    # To first order the sums below do not depend on the means (centred entries sum to
    # 0), so the means need a gradient only for second derivatives. Over processes they
    # must have none, because each process sees only its own part of that 0.
    means = [x / count.clamp(min=1) for x in (sum_a, sum_b)]
    if settings.group is not None:
        means = [mean.detach() for mean in means]
    a, b = (x - mean.unsqueeze(dim) for x, mean in zip((a, b), means, strict=True))
    var_a, cov, var_b = total(a * a, a * b, b * b)
    # avoid the square root of 0, whose gradient is infinite
    constant_a, constant_b = (
        is_constant(var, mean, count, settings.activation)
        for var, mean in zip((var_a, var_b), means, strict=True)
    )
    constant = constant_a | constant_b
    norm_a, norm_b = (x.masked_fill(constant, 1).sqrt() for x in (var_a, var_b))
    corr = (cov / (norm_a * norm_b + settings.eps)).masked_fill(constant, 0)
    if settings.eps:
        return corr
    # two scores correlate at 1 or -1: the gradient would be only rounding error
    return torch.where(count > 2, corr, corr.detach())

"""Hinton's loss for heads with a sigmoid per class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.registry import MODELS

from .correlations.common import check_teacher, compute_dtype


@MODELS.register_module()
class BinaryKLDivLoss(nn.Module):
    r"""Kullback-Leibler divergence of the student's sigmoids from the teacher's.

    Each class is a Bernoulli variable, as in the head of a dense detector. With
    :math:`p = \sigma(\text{logits} / \tau)` of student and teacher,

    .. math::
        \text{loss} = \text{loss\_weight} \cdot \tau^2 \cdot \text{mean over rows of }
            \sum_\text{classes} \left[ p^t \log \frac{p^t}{p^s}
            + (1 - p^t) \log \frac{1 - p^t}{1 - p^s} \right]

    Source: Hinton et al., arXiv 1503.02531, section 2; Yang et al., ICCV 2023 (arXiv
    2308.14286), for dense detectors distilled with one sigmoid per class.

    Args:
        tau: Temperature that divides the logits.
        loss_weight: Weight of the loss. A dense detector needs a large one: the mean is
            over all rows, and few of them contain an object.

    Raises:
        ValueError: ``tau`` is not positive.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(
                f'BinaryKLDivLoss needs a temperature tau > 0, got tau={tau!r}.'
            )
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the loss, in fp32 (float64 for float64 logits).

        Args:
            student_logits: Shape (rows, classes).
            teacher_logits: The same shape; they get no gradient.

        Returns:
            A 0-dim tensor.

        Raises:
            ValueError: The teacher's logits hold NaN or inf.
        """
        dtype = compute_dtype(student_logits, teacher_logits)
        student = student_logits.to(dtype) / self.tau
        teacher = teacher_logits.detach().to(dtype) / self.tau
        check_teacher(teacher)
        target = teacher.sigmoid()
        # cross entropy minus the teacher's own entropy, both safe for large logits
        cross, own = (
            F.binary_cross_entropy_with_logits(logits, target, reduction='none')
            for logits in (student, teacher)
        )
        return self.loss_weight * self.tau**2 * (cross - own).sum(1).mean()

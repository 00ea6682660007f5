"""The DIST loss: keep the teacher's relations, not its exact probabilities."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdist.registry import MODELS

from .correlations import Settings, correlations
from .correlations.common import compute_dtype, process_group, sum_over_processes
from .correlations.plain import ACTIVATIONS


class Terms(NamedTuple):
    """The loss, and the detached mean correlations (None for a term of weight 0)."""

    loss: Tensor
    inter: Tensor | None
    intra: Tensor | None


@MODELS.register_module()
class DISTLoss(nn.Module):
    r"""Loss of "Knowledge Distillation from A Stronger Teacher".

    Source: Huang et al., NeurIPS 2022 (arXiv 2205.10536), equations 6 to 10.
    With :math:`Y` the (rows, classes) matrix of the probabilities of
    ``logits / tau``,

    .. math::
        \text{inter} &= 1 - \text{mean over rows of }
            \rho(Y^s_{row, :}, Y^t_{row, :}) \\
        \text{intra} &= 1 - \text{mean over classes of }
            \rho(Y^s_{:, class}, Y^t_{:, class}) \\
        \text{loss} &= \text{loss\_weight} \cdot \tau^2 \cdot
            (\beta \cdot \text{inter} + \gamma \cdot \text{intra})

    where :math:`\rho` is Pearson's correlation. A row is one instance: a pixel,
    an anchor location, a proposal or a query.

    **Scale.** A correlation is scale-invariant: equal logits give a loss of 0 however
    small their probabilities are, and smaller student logits get larger gradients. In
    the first steps of a head trained from scratch, these far outweigh the student's own
    losses; the Distiller's ``balance`` limits their ratio. The ``eps=1e-8`` of the
    published code changes a trained model's correlations by 1e-4 or less, but it
    exceeds the product of the norms for the scores of a newly initialised head, and for
    classes whose probabilities are below about 1e-6 in all rows.

    **Constant scores.** A row or class with constant scores has no relation: its
    correlation is 0, without gradient. Scores are constant if their spread is at most
    1e-6 of their mean, which is what rounding leaves in fp32, or at most 1e-18. For
    probabilities near 1, the distance to 1 replaces the mean, as long as logits are
    within 27 of 0. Without ``eps``, two different scores give 1 or -1 and no gradient.

    The loss is computed in fp32, also under autocast; in float64 for float64 logits
    and, on the fast paths, for scores of which fp32 keeps too few digits.

    Args:
        beta: Weight of the inter-class term. 0 leaves it out.
        gamma: Weight of the intra-class term. 0 leaves it out.
        tau: Temperature that divides the logits.
        activation: How logits become probabilities: ``'softmax'`` over the classes,
            ``'sigmoid'``, or ``'identity'`` to compare the scores as they are.
        scale_by_tau: Multiply by ``tau ** 2``, as the published code does but not the
            paper.
        loss_weight: Weight of the loss.
        sync: Correlate over the rows of all processes; the gradient is correct for DDP,
            which averages over processes. Every process must call the loss equally
            often, with no rows if need be.
        eps: Added to the product of the norms in a correlation, see above.

    Attributes:
        inter_corr: Mean inter-class correlation of the last call, a detached 0-dim
            tensor; 0 if no row counted. A term of weight 0 has it too.
        intra_corr: The same for the intra-class correlation.
        path: How they are computed, see
            :func:`mmdist.losses.correlations.correlations`. For tests and benchmarks.

    Raises:
        ValueError: ``activation`` is unknown, or ``tau`` is not positive.

    Example:
        >>> student, teacher = torch.randn(2, 8, 80, 32, 32)
        >>> loss, inter, intra = DISTLoss(activation='sigmoid').terms(student, teacher)
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        activation: str = 'softmax',
        scale_by_tau: bool = True,
        loss_weight: float = 1.0,
        sync: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DISTLoss needs a temperature tau > 0, got tau={tau!r}.')
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.activation = check_activation(activation)
        self.scale_by_tau = scale_by_tau
        self.loss_weight = loss_weight
        self.sync = sync
        self.eps = eps
        self.inter_corr: Tensor | None = None
        self.intra_corr: Tensor | None = None
        self.path = 'auto'

    def extra_repr(self) -> str:
        arguments = inspect.signature(type(self)).parameters
        return ', '.join(f'{key}={getattr(self, key)!r}' for key in arguments)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss: ``terms(...).loss``."""
        return self.terms(student_logits, teacher_logits, mask).loss

    def terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        *,
        activation: str | None = None,
        beta: float | None = None,
    ) -> Terms:
        """Compute the loss and the mean correlations.

        Args:
            student_logits: Floating point, shape (rows, classes) or
                (N, classes, *spatial); in the latter every position is a row.
            teacher_logits: The same shape.
            mask: Bool, True where a row counts, shape (rows,) or (N, *spatial). Other
                rows change nothing, whatever they hold. ``None`` if all count.
            activation: Replaces the loss's own for this call.
            beta: Replaces the loss's own for this call.

        Returns:
            The loss in fp32 (float64 for float64 logits), 0 with gradient 0 if no row
            counts, and the correlations (None for a term of weight 0).

        Raises:
            TypeError: Logits are not floating point or the mask is not bool.
            ValueError: Shapes do not fit, or the teacher's logits contain NaN or inf in
                rows that count (on a GPU a later operation raises the error).
        """
        activation = check_activation(activation or self.activation)
        beta = self.beta if beta is None else beta
        check_inputs(student_logits, teacher_logits, mask)
        group = process_group() if self.sync else None
        device = student_logits.device.type
        with torch.autocast('cpu' if device == 'meta' else device, enabled=False):
            settings = Settings(activation, self.tau, self.eps, group)
            inter_corr, intra_corr = correlations(
                student_logits, teacher_logits, mask, settings, self.path
            )
            dtype = compute_dtype(student_logits, teacher_logits)
            self.inter_corr = inter_corr.detach().to(dtype)
            self.intra_corr = intra_corr.detach().to(dtype)

            scale = self.loss_weight * (self.tau**2 if self.scale_by_tau else 1.0)
            counts = any_row(student_logits, mask, group)
            terms = ((beta, inter_corr), (self.gamma, intra_corr))
            # with both terms left out, the loss is 0 but still in the graph
            terms = [term for term in terms if term[0] != 0] or terms
            # `counts` last: a float times a bool tensor would be fp32
            losses = [weight * scale * (1 - corr) * counts for weight, corr in terms]
            return Terms(
                sum(losses[1:], losses[0]).to(dtype),
                self.inter_corr if beta != 0 else None,
                self.intra_corr if self.gamma != 0 else None,
            )


def any_row(
    logits: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor | bool:
    """Whether any row counts; a tensor if only the device knows."""
    found = logits.numel() if mask is None else mask.sum()
    if mask is None and group is not None:
        found = torch.full((), found, device=logits.device)
    return sum_over_processes(found, group) > 0


def check_activation(activation: str) -> str:
    """Raise ValueError unless an activation is known; return it."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'DISTLoss does not know activation={activation!r}; choose one of '
            f'{", ".join(map(repr, ACTIVATIONS))}.'
        )
    return activation


def check_inputs(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Raise unless the inputs of ``DISTLoss`` fit."""
    for name, logits in (('student', student), ('teacher', teacher)):
        if not logits.is_floating_point():
            raise TypeError(
                f'DISTLoss needs floating-point logits, but the {name} gave '
                f'{logits.dtype}. Pass the raw scores of the classes, not labels.'
            )
    if student.ndim < 2:
        raise ValueError(
            'DISTLoss needs logits of shape (rows, classes) or (N, classes, *spatial), '
            f'got {tuple(student.shape)}. Add the missing dimension.'
        )
    if student.shape != teacher.shape:
        raise ValueError(
            'DISTLoss needs logits of the same shape, but the student gave '
            f'{tuple(student.shape)}, the teacher {tuple(teacher.shape)}. Map the '
            "teacher's classes to those of the student and resize its output to the "
            'same size.'
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f'The mask of DISTLoss must be bool (True where a row counts), got '
            f'{mask.dtype}. Pass a comparison, e.g. `labels != 255`.'
        )
    rows = (student.shape[0], *student.shape[2:])
    if mask.shape not in (rows, (math.prod(rows),)):
        raise ValueError(
            f'The mask has shape {tuple(mask.shape)}, but logits of shape '
            f'{tuple(student.shape)} need {rows}: one entry per row, none per class.'
        )

"""The loss of DIST: keep the teacher's relations, not its exact probabilities."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.registry import MODELS

from .correlations import cpu as fused
from .correlations.plain import (
    check_teacher,
    compute_dtype,
    inter_class_correlation,
    intra_class_correlation,
    sum_over_processes,
)

ACTIVATIONS = {
    'softmax': lambda logits: logits.softmax(dim=1),
    'sigmoid': torch.sigmoid,
    'identity': lambda logits: logits,
}


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
    an anchor location, a proposal or a query. A row or class whose scores are
    constant has no relation: its correlation is 0 and gives no gradient.

    A correlation does not see how large the scores are, so the smaller the
    student's logits, the larger the gradient by them: in the first steps of a
    head that starts from scratch it outweighs the student's own losses by far.
    Where that holds a short training back, ``mmdist.DistillScheduleHook`` ramps
    the loss in.

    The loss is computed in fp32 (float64 logits in float64), also under
    autocast. The teacher's logits get no gradient.

    Args:
        beta (float): Weight of the inter-class term. 0 leaves it out.
        gamma (float): Weight of the intra-class term. 0 leaves it out.
        tau (float): Temperature that divides the logits.
        activation (str): How logits become probabilities: ``'softmax'`` over
            the classes, ``'sigmoid'``, or ``'identity'`` for scores that are to
            be compared as they are.
        scale_by_tau (bool): Multiply by ``tau ** 2``, as the published code does
            and the paper does not.
        loss_weight (float): Weight of the loss.
        sync (bool): Correlate over the rows of all processes, not only over
            those of this one; the gradient is right for DDP, which averages
            over processes. Every process must call the loss equally often, if
            need be with no rows. Without ``torch.distributed`` it changes
            nothing.
        eps (float): Added to the product of the norms in a correlation.

    Attributes:
        inter_corr (Tensor): Mean inter-class correlation of the last call, a
            detached 0-dim tensor on the device of the logits.
        intra_corr (Tensor): The same for the intra-class correlation. Both are
            0 where no row counted, and are known for a term of weight 0 too.

    Raises:
        ValueError: ``activation`` is unknown or ``tau`` is not positive.
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
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f'DISTLoss does not know activation={activation!r}; choose one of '
                f'{", ".join(map(repr, ACTIVATIONS))}.'
            )
        if not tau > 0:
            raise ValueError(f'DISTLoss needs a temperature tau > 0, got tau={tau!r}.')
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.activation = activation
        self.scale_by_tau = scale_by_tau
        self.loss_weight = loss_weight
        self.sync = sync
        self.eps = eps
        self.inter_corr: Tensor | None = None
        self.intra_corr: Tensor | None = None

    def extra_repr(self) -> str:
        return (
            f'beta={self.beta}, gamma={self.gamma}, tau={self.tau}, '
            f'activation={self.activation!r}, scale_by_tau={self.scale_by_tau}, '
            f'loss_weight={self.loss_weight}, sync={self.sync}'
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student_logits (Tensor): Floating point, shape (rows, classes) or
                (N, classes, *spatial); in the latter every position is a row.
            teacher_logits (Tensor): The same shape.
            mask (Tensor, optional): Bool, True where a row counts, shape
                (rows,) or (N, *spatial). Other rows change nothing, whatever
                they hold.

        Returns:
            Tensor: A 0-dim tensor in fp32 (float64 for float64 logits); 0 with
                gradient 0 where no row counts.

        Raises:
            TypeError: Logits are not floating point or the mask is not bool.
            ValueError: Shapes do not fit, or the teacher's logits hold NaN or
                inf in rows that count (on a GPU, where nothing waits for the
                device, the error may surface at a later operation).
        """
        check_inputs(student_logits, teacher_logits, mask)
        group = process_group() if self.sync else None
        with torch.autocast(student_logits.device.type, enabled=False):
            path = choose_path(student_logits, teacher_logits, self.activation)
            inter_corr, intra_corr = path(
                student_logits,
                teacher_logits,
                mask,
                self.activation,
                self.tau,
                self.eps,
                group,
            )
            dtype = compute_dtype(student_logits, teacher_logits)
            self.inter_corr = inter_corr.detach().to(dtype)
            self.intra_corr = intra_corr.detach().to(dtype)

            scale = self.loss_weight * (self.tau**2 if self.scale_by_tau else 1.0)
            scale = scale * any_row(student_logits, mask, group)
            terms = ((self.beta, inter_corr), (self.gamma, intra_corr))
            # with both terms left out the loss is 0, and still in the graph
            terms = [term for term in terms if term[0] != 0] or terms
            losses = [weight * scale * (1 - corr) for weight, corr in terms]
            return sum(losses[1:], losses[0]).to(dtype)


def choose_path(student: Tensor, teacher: Tensor, activation: str) -> Callable:
    """How the correlations are computed: the fast way of the device, if it has one."""
    if student.numel() > 0 and not torch.compiler.is_compiling():
        devices = {student.device, teacher.device}
        if all(device.type == 'cpu' for device in devices):
            return fused.correlations
        # not fake tensors and other subclasses, into which a kernel cannot look
        plain = {type(student), type(teacher)} <= {Tensor, nn.Parameter}
        if plain and len(devices) == 1 and student.is_cuda:
            return gpu_path(student.device, student.dtype, teacher.dtype, activation)
    return correlations


@functools.cache
def gpu_path(
    device: torch.device,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    activation: str,
) -> Callable:
    """The kernels, if this machine has Triton and they compile and compute the same.

    That is asked once, on a few logits: what cannot be seen where the kernels were
    written is the card, the driver and the compiler on which they run.
    """
    try:
        from .correlations import gpu as fused_gpu

        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((2, 2, 37, 100), generator=generator)
        logits[..., 64:] *= 0.01  # nearly constant
        mask = (torch.rand((2, 100), generator=generator) < 0.8).to(device)
        student = logits[0].to(device, student_dtype).requires_grad_()
        teacher = logits.sum(0).to(device, teacher_dtype)
        results = []
        with torch.enable_grad():
            for path in (fused_gpu.correlations, correlations):
                corr = path(student, teacher, mask, activation, 1.0, 1e-8, None)
                grad = torch.autograd.grad(sum(corr), student)[0].double()
                results.append((torch.stack(corr).detach(), grad / grad.norm()))
        errors = [torch.dist(*pair).item() for pair in zip(*results, strict=True)]
        # the gradient as a whole: in half precision any of its elements may round
        # the other way
        if errors[0] < 1e-4 and errors[1] < 1e-2:
            return fused_gpu.correlations
        level, reason = logging.WARNING, f'compute something else here: off by {errors}'
    except Exception as error:  # anything that a compiler may say
        level, reason = logging.INFO, f'do not run: {str(error).strip()[:200]}'
    print_log(
        f'DISTLoss takes the slower way, since its Triton kernels {reason}',
        logger='current',
        level=level,
    )
    return correlations


def correlations(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    activation: str,
    tau: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The plain path: what ``fused.correlations`` computes, as the paper writes it."""
    student, teacher = as_rows(student), as_rows(teacher.detach())
    dtype = compute_dtype(student, teacher)
    weight = None
    if mask is not None:
        weight = mask.reshape(-1).to(dtype)
        # before any arithmetic: 0 * nan is nan, in the gradient as well
        out = mask.logical_not().reshape(-1, 1)
        student, teacher = student.masked_fill(out, 0), teacher.masked_fill(out, 0)
    check_teacher(teacher)
    student, teacher = (
        ACTIVATIONS[activation](logits.to(dtype) / tau) for logits in (student, teacher)
    )
    return (
        inter_class_correlation(student, teacher, weight, group, eps),
        intra_class_correlation(student, teacher, weight, group, eps),
    )


def as_rows(logits: Tensor) -> Tensor:
    """Reshape (N, classes, *spatial) to (N * prod(spatial), classes)."""
    if logits.ndim == 2:
        return logits
    return logits.movedim(1, -1).flatten(0, -2)


def any_row(
    logits: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor | bool:
    """Whether any row counts; a tensor where only the device knows."""
    if mask is not None:
        rows = mask.sum()
    else:
        rows = logits.shape[0] * math.prod(logits.shape[2:])
        if group is None:
            return rows > 0
        rows = torch.full((), rows, device=logits.device)
    return sum_over_processes(rows, group) > 0


def check_inputs(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Stop with a sentence where the inputs of ``DISTLoss`` do not fit."""
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
            f'The student gave logits of shape {tuple(student.shape)}, the teacher of '
            f"{tuple(teacher.shape)}; DISTLoss needs them equal. Map the teacher's "
            'classes to those of the student and resize its output to the same size.'
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


def process_group() -> dist.ProcessGroup | None:
    """The group of all processes, ``None`` where there is only one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if dist.get_world_size() > 1 else None

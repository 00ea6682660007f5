"""Pearson correlation between the predictions of a student and a teacher.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher",
NeurIPS 2022 (arXiv 2205.10536), section 4, equations 6 to 9.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# A vector whose spread (the norm after centring) is at most this fraction of
# its norm is constant to fp32 accuracy: the unit roundoff of fp32 is 6e-8, and
# a probability and the mean of many carry a few of those, so what is left after
# centring is rounding noise, whose direction means nothing. Its correlation is
# defined as 0 with gradient 0. It also bounds the gradient of a correlation by
# 1 / (MIN_SPREAD * norm); without it an all-zero student gets 1 / eps.
MIN_SPREAD = 1e-6


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce that makes k processes one, under DDP's gradient averaging.

    Every process computes the same loss from the sums and nothing else, so the
    gradient by the sums is known without communication. DDP divides gradients
    by the number of processes; the factor here undoes that.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world_size = dist.get_world_size(group)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world_size, None


def sum_over_processes(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor over the processes of a group.

    Args:
        tensor (Tensor): Any shape, the same on every process.
        group (ProcessGroup, optional): ``None`` means this process only.

    Returns:
        Tensor: The sum. Its gradient is such that the average over the
            processes of their parameter gradients (what DDP computes) is the
            gradient of one process that holds all the data. Each process must
            weigh the loss alike.
    """
    if group is None:
        return tensor
    # in float64 whatever the processes compute in, so that they agree
    return _SumOverProcesses.apply(tensor.double(), group).to(tensor.dtype)


def pearson(
    a: Tensor,
    b: Tensor,
    dim: int,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Pearson correlation of two matrices along one dimension.

    It is ``sum(a * b) / (|a| * |b| + eps)`` after both were centred, as in the
    published code. Where ``a`` or ``b`` is constant to fp32 accuracy (see
    ``MIN_SPREAD``) the correlation is 0, and so is its gradient.

    Args:
        a (Tensor): Shape (rows, classes), floating point.
        b (Tensor): Shape (rows, classes).
        dim (int): The dimension that is correlated and disappears.
        weight (Tensor, optional): 1 where an entry counts and 0 where it does
            not, broadcastable to ``a``. Entries of weight 0 must be finite.
        group (ProcessGroup, optional): Correlate over the entries of all
            processes of this group. ``None`` means this process only.
        eps (float): Added to the product of the norms.

    Returns:
        Tensor: Correlations, shape (classes,) for ``dim=0``, (rows,) for
            ``dim=1``.
    """
    if weight is None:
        weight = a.new_ones((1, 1))

    def total(*terms: Tensor) -> Tensor:
        sums = torch.stack([(weight * term).sum(dim) for term in terms])
        return sum_over_processes(sums, group)

    count, sum_a, sum_b = total(torch.ones_like(a), a, b)
    mean_a, mean_b = sum_a / count.clamp(min=1), sum_b / count.clamp(min=1)
    # The sums below do not change to first order with the means (centred entries
    # sum to 0), so the means need no gradient; over processes they must have none,
    # as each process sees only its own part of that 0.
    mean_a, mean_b = mean_a.detach(), mean_b.detach()
    a, b = a - mean_a.unsqueeze(dim), b - mean_b.unsqueeze(dim)
    var_a, cov, var_b = total(a * a, a * b, b * b)
    return correlation(cov, var_a, var_b, count * mean_a**2, count * mean_b**2, eps)


def correlation(
    cov: Tensor,
    var_a: Tensor,
    var_b: Tensor,
    mean_a: Tensor,
    mean_b: Tensor,
    eps: float,
) -> Tensor:
    """Correlation from centred sums, 0 without gradient for constant vectors.

    Args:
        cov (Tensor): Sums of the product of the centred entries, any shape.
        var_a (Tensor): Sums of the squared centred entries of the first.
        var_b (Tensor): The same of the second.
        mean_a (Tensor): Squared norm that centring took from the first.
        mean_b (Tensor): The same of the second.
        eps (float): Added to the product of the norms.

    Returns:
        Tensor: Correlations in the shape of ``cov``.
    """
    constant = is_constant(var_a, mean_a) | is_constant(var_b, mean_b)
    norm_a = var_a.masked_fill(constant, 1).sqrt()
    norm_b = var_b.masked_fill(constant, 1).sqrt()
    return (cov / (norm_a * norm_b + eps)).masked_fill(constant, 0)


def is_constant(var: Tensor, mean: Tensor) -> Tensor:
    """Where a vector is constant to fp32 accuracy.

    Args:
        var (Tensor): Sums of the squared centred entries, any shape.
        mean (Tensor): Squared norm that centring took; what is left of a
            constant is so little that this is its squared norm.

    Returns:
        Tensor: Bool, in the shape of ``var``.
    """
    # `<=`: a NaN of the student is passed on and not taken for a constant
    return var <= MIN_SPREAD**2 * mean


def inter_class_correlation(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Mean over the rows of the correlation of their classes (equation 7).

    Args:
        student (Tensor): Scores of shape (rows, classes), floating point.
        teacher (Tensor): Scores of the same shape.
        weight (Tensor, optional): 1 where a row counts and 0 where it does
            not, shape (rows,). Rows of weight 0 must be finite.
        group (ProcessGroup, optional): Average over the rows of all processes
            of this group. ``None`` means this process only.
        eps (float): Added to the product of the norms.

    Returns:
        Tensor: A 0-dim tensor; 0 where no row counts.
    """
    rows = pearson(student, teacher, dim=1, eps=eps)
    weight = torch.ones_like(rows) if weight is None else weight
    total, count = sum_over_processes(
        torch.stack([(weight * rows).sum(), weight.sum()]), group
    )
    return total / count.clamp(min=1)


def intra_class_correlation(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Mean over the classes of the correlation of their rows (equation 9).

    Args:
        student (Tensor): Scores of shape (rows, classes), floating point.
        teacher (Tensor): Scores of the same shape.
        weight (Tensor, optional): 1 where a row counts and 0 where it does
            not, shape (rows,). Rows of weight 0 must be finite.
        group (ProcessGroup, optional): Correlate over the rows of all
            processes of this group. ``None`` means this process only.
        eps (float): Added to the product of the norms.

    Returns:
        Tensor: A 0-dim tensor; 0 where no row counts.
    """
    weight = None if weight is None else weight.unsqueeze(1)
    return pearson(student, teacher, 0, weight, group, eps).mean()


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What logits are computed in: float64 where one is, else fp32."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def check_teacher(logits: Tensor) -> None:
    """Stop where a teacher gave NaN or inf; without waiting for a GPU."""
    if logits.numel() > 0:
        # NaN and inf show in the extremes, which need one pass and no copy
        raise_for_teacher(torch.stack(logits.aminmax()).isfinite().all())


def raise_for_teacher(finite: Tensor) -> None:
    """Stop where the teacher's logits were not finite (a bool tensor of one element).

    Raises:
        ValueError: They hold NaN or inf. On a GPU an error, at a later operation.
    """
    message = (
        'The teacher gave logits with NaN or inf. Check that the images hold none, its '
        'checkpoint, and that its data_preprocessor (mean, std, channel order) is the '
        'one it was trained with; if it runs in fp16, run it in bf16 or fp32.'
    )
    if finite.is_cuda:
        torch._assert_async(finite, message)
    elif not finite:
        raise ValueError(message)

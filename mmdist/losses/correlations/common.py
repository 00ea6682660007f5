"""What the ways of computing the correlations share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# A vector of scores is constant where its spread (the root mean square of what
# centring leaves) is at most this fraction of its mean. A score and the mean of many
# have rounding errors of a few 6e-8 in fp32, and so have the logits: the direction of
# what is left is noise. It also bounds the gradient with respect to the logits.
MIN_SPREAD = 1e-6
# In float64 a probability near 1 keeps the digits of its distance to 1, of which the
# fraction is taken then: p and 1 - p are treated alike, down to this distance.
MIN_DISTANCE = 1e-6
# And a spread below this one is nothing: its square is no longer a number in fp32.
MIN_SCORE = 1e-18


class Settings(NamedTuple):
    """How scores are correlated.

    Args:
        activation: ``'softmax'``, ``'sigmoid'`` or ``'identity'``.
        tau: Temperature that divides the logits.
        eps: Added to the product of the norms in a correlation.
        group: Correlate over the rows of all processes of this group. ``None`` means
            this process only.
    """

    activation: str = 'softmax'
    tau: float = 1.0
    eps: float = 0.0
    group: dist.ProcessGroup | None = None


def as_rows(logits: Tensor) -> Tensor:
    """Reshape (N, classes, *spatial) to (N * prod(spatial), classes)."""
    if logits.ndim == 2:
        return logits
    return logits.movedim(1, -1).flatten(0, -2)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What logits are computed in: float64 where one is, else fp32."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def is_constant(
    var: Tensor, mean: Tensor, count: Tensor | int, activation: str
) -> Tensor:
    """Where a vector of scores is constant, see ``MIN_SPREAD``.

    Args:
        var: Sums of the squared centred scores, any shape.
        mean: Means of the scores, in the shape of ``var``.
        count: Number of scores of a vector.
        activation: What the scores come from.

    Returns:
        Bool, in the shape of ``var``.
    """
    size = mean.abs()
    if activation != 'identity' and var.dtype == torch.float64:
        size = torch.minimum(size, (1 - mean).abs().clamp(min=MIN_DISTANCE))
    # `<=`: a NaN of the student is passed on and not taken for a constant
    return var <= count * size.mul(MIN_SPREAD).clamp(min=MIN_SCORE).square()


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce that makes k processes one, under DDP's gradient averaging.

    Every process computes the same loss from the sums and nothing else, so the
    gradient with respect to the sums is known without communication. DDP divides
    gradients by the number of processes; the factor here undoes that.
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
        tensor: Any shape, the same on every process.
        group: ``None`` means this process only.

    Returns:
        The sum. Its gradient is such that the average over the processes of their
        parameter gradients (what DDP computes) is the gradient of one process that
        holds all the data. Each process must weigh the loss alike.
    """
    if group is None:
        return tensor
    # in float64 whatever the processes compute in, so that they agree
    return _SumOverProcesses.apply(tensor.double(), group).to(tensor.dtype)


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

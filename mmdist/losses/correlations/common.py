"""What the paths that compute the correlations share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size
from torch import Tensor

# A vector of scores is constant if its spread (the root mean square after centring) is
# at most this fraction of its mean. In fp32, scores, their mean and the logits have
# rounding errors of a few 6e-8, so the direction of what centring leaves is noise. The
# threshold also bounds the gradient with respect to the logits.
MIN_SPREAD = 1e-6
# In float64 a probability near 1 keeps the digits of its distance to 1, so the fraction
# is taken of that: p and 1 - p are treated alike, down to this distance.
MIN_DISTANCE = 1e-6
# A smaller spread counts as zero: its square is about to underflow in fp32.
MIN_SCORE = 1e-18


class Settings(NamedTuple):
    """How scores are correlated.

    The first three are arguments of ``DISTLoss``. Rows are correlated over all
    processes of ``group``, if there is one.
    """

    activation: str = 'softmax'
    tau: float = 1.0
    eps: float = 0.0
    group: dist.ProcessGroup | None = None


def as_rows(logits: Tensor) -> Tensor:
    """Reshape (N, classes, *spatial) to (N * prod(spatial), classes)."""
    return logits.movedim(1, -1).flatten(0, -2)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if either has it, else fp32."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def is_constant(
    var: Tensor, mean: Tensor, count: Tensor | int, activation: str
) -> Tensor:
    """Whether each vector of scores is constant, see ``MIN_SPREAD``.

    ``var`` holds the sums of the squared centred scores; ``mean`` and the result have
    its shape. ``count`` is the number of scores per vector.
    """
    size = mean.abs()
    if activation != 'identity' and var.dtype == torch.float64:
        size = torch.minimum(size, (1 - mean).abs().clamp(min=MIN_DISTANCE))
    # `<=`: a NaN from the student propagates and does not count as constant
    return var <= count * size.mul(MIN_SPREAD).clamp(min=MIN_SCORE).square()


class _SumOverProcesses(torch.autograd.Function):
    """A sum whose backward pass needs no communication, since every process computes
    the same loss from it. DDP divides gradients by the number of processes; the factor
    here undoes that."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world_size = get_world_size(group)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world_size, None


def process_group() -> dist.ProcessGroup | None:
    """The group of all processes; ``None`` if there is only one."""
    return dist.group.WORLD if get_world_size() > 1 else None


def sum_over_processes(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor, of the same shape on every process, over a group of processes.

    Without a group it is returned unchanged. The gradient is scaled so that DDP's
    average of the parameter gradients is that of one process with all the data, if all
    processes weight the loss equally.
    """
    if group is None:
        return tensor
    # always in float64, so that processes with different dtypes agree
    return _SumOverProcesses.apply(tensor.double(), group).to(tensor.dtype)


def check_teacher(logits: Tensor) -> None:
    """Raise unless a teacher's logits are finite, without waiting for a GPU."""
    if logits.numel() > 0:
        # NaN and inf show in the extremes, which need one pass and no copy
        raise_for_teacher(torch.stack(logits.aminmax()).isfinite().all())


def raise_for_teacher(finite: Tensor) -> None:
    """Raise ValueError unless the teacher's logits were finite, a bool of one element.

    If it can only be read later (on a GPU, or compiled), the error also comes later, as
    a RuntimeError. Within ``torch.func`` nothing is checked on a CPU.
    """
    message = (
        "The teacher's logits contain NaN or inf. Check that the images do not, check "
        'its checkpoint, and check that its data_preprocessor (mean, std, channel '
        'order) is the one it was trained with. If it runs in fp16, use bf16 or fp32.'
    )
    if torch.compiler.is_compiling() or finite.device.type != 'cpu':
        torch._assert_async(finite, message)
    elif not (torch._C._are_functorch_transforms_active() or finite):
        raise ValueError(message)

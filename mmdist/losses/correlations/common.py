"""What the ways of computing the correlations share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size
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

    The first three are arguments of ``DISTLoss``. Rows are correlated over all
    processes of the group, without one over those of this process.
    """

    activation: str = 'softmax'
    tau: float = 1.0
    eps: float = 0.0
    group: dist.ProcessGroup | None = None


def as_rows(logits: Tensor) -> Tensor:
    """Reshape (N, classes, *spatial) to (N * prod(spatial), classes)."""
    return logits.movedim(1, -1).flatten(0, -2)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What logits are computed in: float64 where one is, else fp32."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def is_constant(
    var: Tensor, mean: Tensor, count: Tensor | int, activation: str
) -> Tensor:
    """Where a vector of scores is constant, see ``MIN_SPREAD``.

    ``var`` has the sums of the squared centred scores, ``mean`` and the result have its
    shape, ``count`` is the number of scores of a vector.
    """
    size = mean.abs()
    if activation != 'identity' and var.dtype == torch.float64:
        size = torch.minimum(size, (1 - mean).abs().clamp(min=MIN_DISTANCE))
    # `<=`: a NaN of the student is passed on and not taken for a constant
    return var <= count * size.mul(MIN_SPREAD).clamp(min=MIN_SCORE).square()


class _SumOverProcesses(torch.autograd.Function):
    """Every process computes the same loss from the sums and nothing else, so the
    gradient with respect to the sums is known without communication. DDP divides
    gradients by the number of processes; the factor here undoes that."""

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
    """The group of all processes, ``None`` where there is only one."""
    return dist.group.WORLD if get_world_size() > 1 else None


def sum_over_processes(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor, of one shape on every process, over the processes of a group.

    Without a group it is returned as it is. The gradient of the sum is such that the
    average over the processes of their parameter gradients (what DDP computes) is the
    gradient of one process that holds all the data, if all weigh the loss alike.
    """
    if group is None:
        return tensor
    # in float64 whatever the processes compute in, so that they agree
    return _SumOverProcesses.apply(tensor.double(), group).to(tensor.dtype)


def check_teacher(logits: Tensor) -> None:
    """Raise unless a teacher's logits are finite; without waiting for a GPU."""
    if logits.numel() > 0:
        # NaN and inf show in the extremes, which need one pass and no copy
        raise_for_teacher(torch.stack(logits.aminmax()).isfinite().all())


def raise_for_teacher(finite: Tensor) -> None:
    """Raise unless the teacher's logits were finite (a bool tensor of one element).

    Where the value can only be read later (on a GPU, compiled), so is the error raised,
    as a RuntimeError; ``torch.func`` lets nobody read it.

    Raises:
        ValueError: They hold NaN or inf.
    """
    message = (
        'The teacher gave logits with NaN or inf. Check that the images hold none, its '
        'checkpoint, and that its data_preprocessor (mean, std, channel order) is the '
        'one it was trained with; if it runs in fp16, run it in bf16 or fp32.'
    )
    if torch.compiler.is_compiling() or finite.device.type != 'cpu':
        torch._assert_async(finite, message)
    elif not (torch._C._are_functorch_transforms_active() or finite):
        raise ValueError(message)

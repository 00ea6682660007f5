"""Mean inter- and intra-class correlations, computed to suit the device.

``plain`` is the formula in autograd. ``cpu`` and ``gpu`` compute the same in few passes
over the logits and keep almost nothing for the backward pass.
"""

from __future__ import annotations

import functools
import logging

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from . import cpu, plain
from .common import Settings, as_rows

__all__ = ['Settings', 'as_rows', 'choose_path', 'correlations']


def correlations(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    settings: Settings,
    path: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """Mean inter- and intra-class correlation of student and teacher, 0-dim.

    Args and errors are those of ``DISTLoss.terms``; the teacher gets no gradient.
    ``path`` is ``'plain'``, ``'cpu'``, ``'gpu'``, or ``'auto'`` for the fastest that
    works with these logits. Empty logits always take ``'plain'``. ``'cpu'`` and
    ``'gpu'`` return float64, so that 1 - correlation keeps its digits.
    """
    if path == 'auto':
        path = choose_path(student, teacher, settings.activation, mask)
    if path == 'plain' or not student.numel():
        return plain.correlations(student, teacher, mask, settings)
    if path == 'cpu':
        return cpu.correlations(student, teacher, mask, settings)
    from . import gpu  # not every torch comes with Triton

    return gpu.correlations(student, teacher, mask, settings)


def choose_path(
    student: Tensor, teacher: Tensor, activation: str, mask: Tensor | None = None
) -> str:
    """The fastest path that works with these logits."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return 'plain'
    # autograd does not save inference tensors for a backward pass
    inputs = [x for x in (student, teacher, mask) if x is not None]
    if torch.is_grad_enabled() and any(x.is_inference() for x in inputs):
        return 'plain'
    if student.device.type == teacher.device.type == 'cpu':
        return 'cpu'
    # not fake tensors and other subclasses, which a kernel cannot read
    own = {type(student), type(teacher)} <= {Tensor, nn.Parameter}
    if own and student.is_cuda and student.device == teacher.device:
        kind = (student.device, student.dtype, teacher.dtype, activation)
        return 'gpu' if kernels_work(*kind) else 'plain'
    return 'plain'


# The result for each kind of logits, once known
_WORK: dict[tuple, bool] = {}


def kernels_work(
    device: torch.device,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    activation: str,
) -> bool:
    """Whether the Triton kernels run on this machine and match the plain path.

    Each kind is tried once, on a few logits, because the card, driver and compiler were
    unknown when the kernels were written. If the GPU is out of memory, nothing is
    concluded, and the next call tries again.
    """
    kind = device, student_dtype, teacher_dtype, activation
    if kind not in _WORK:
        try:
            problem = _problem_of_kernels(*kind)
        except Exception as error:  # a compiler can raise anything
            if 'out of memory' in str(error):  # from torch or the driver
                return False
            problem = f'do not run: {str(error).strip()[:200]}'
        if problem:
            _warn_once(f'DISTLoss uses its slower path: the Triton kernels {problem}')
        _WORK[kind] = not problem
    return _WORK[kind]


def _problem_of_kernels(device, student_dtype, teacher_dtype, activation) -> str:
    """How the kernels differ from the plain path; '' if they do not."""
    from . import gpu

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 2, 37, 100), generator=generator)
    logits[..., 64:] *= 0.01  # nearly constant
    mask = (torch.rand((2, 100), generator=generator) < 0.8).to(device)
    student = logits[0].to(device, student_dtype).requires_grad_()
    teacher = logits.sum(0).to(device, teacher_dtype)
    results = []
    with torch.enable_grad():
        for path in (gpu, plain):
            corr = path.correlations(student, teacher, mask, Settings(activation))
            grad = torch.autograd.grad(sum(corr), student)[0].double()
            results.append((torch.stack(corr).detach(), grad / grad.norm()))
    errors = [torch.dist(*pair).item() for pair in zip(*results, strict=True)]
    # the gradient as a whole, since in half precision any element can round the other
    # way
    is_same = errors[0] < 1e-4 and errors[1] < 1e-2
    return '' if is_same else f'give wrong results here, off by {errors}'


@functools.cache
def _warn_once(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)

"""Logits, some numerically hard, and a loss's value and gradient on them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

INTERPRETED = not torch.cuda.is_available()  # Triton's kernels, see tests/conftest.py

# what is done to random logits; `bias` rises from 0 to 1 over the classes
HARD = {
    'ordinary': lambda z, bias: z,
    'nearly one-hot': lambda z, bias: 30 * z,
    'saturated': lambda z, bias: 1000 * z,
    'nearly uniform': lambda z, bias: 1e-2 * z,
    'more nearly uniform': lambda z, bias: 1e-4 * z,
    # RetinaNet's prior: all scores near 0.01
    'as initialised': lambda z, bias: 0.1 * z - 4.6,
    'the same in every row': lambda z, bias: 1e-3 * z + 5 * bias,
    'classes that never occur': lambda z, bias: z - 40 * bias,
    'classes that never occur at all': lambda z, bias: z - 80 * (bias > 0.5),
    'background': lambda z, bias: z + 8 * (bias == 0),
}
# fp32 leaves no digits of these after centring
FLAT = ['more nearly uniform', 'the same in every row']


def prediction(name, shape):
    """Student's and teacher's logits in fp32, correlated at about 0.7."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, *shape), generator=g)
    bias = torch.linspace(0, 1, shape[1]).view(-1, *[1] * (len(shape) - 2))
    student, teacher = (HARD[name](z, bias) for z in (x, 0.7 * x + 0.7 * noise))
    if name == 'classes that never occur at all':  # for the teacher not even in fp32
        teacher = teacher - 120 * (bias > 0.5)
    return student, teacher


def logits(shape, scale=2.0):
    """Student's and teacher's logits in numpy, which partly agree."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=shape) * scale
    return teacher * 0.5 + rng.normal(size=shape) * scale, teacher


# the same values, laid out differently in memory
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    'a part of a larger one': lambda x: F.pad(x, (1, 2))[..., 1:-2],
    'transposed': lambda x: x.mT.contiguous().mT,
    'classes first': lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def run(loss, student, teacher, *args):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, *args)
    value.backward()
    return value.detach(), student.grad


def value_and_grad(loss, student, teacher, mask=None, dtype=torch.float64):
    """The same for arrays; the teacher gets no gradient."""
    student = torch.tensor(student, dtype=dtype)
    teacher = torch.tensor(teacher, dtype=dtype, requires_grad=True)
    masks = [] if mask is None else [torch.tensor(mask)]
    value, grad = run(loss, student, teacher, *masks)
    assert teacher.grad is None
    return value, grad


def kept_by(loss, student, teacher):
    """The tensors that are kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    ):
        loss(student.requires_grad_(), teacher)
    return kept


def assert_close(ours, oracle, value_tol=1e-5, grad_tol=1e-4):
    assert ((ours[0] - oracle[0]) / oracle[0]).abs() < value_tol
    # the whole gradient of saturated scores can be below 1e-10
    assert (ours[1] - oracle[1]).norm() < grad_tol * max(oracle[1].norm(), 1e-5)

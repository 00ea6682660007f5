"""Logits that are numerically hard, and a loss's value and gradient on them."""

from __future__ import annotations

import torch


def prediction(name, shape):
    """Student's and teacher's logits in fp32, correlated at about 0.7."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, *shape), generator=g)
    y = 0.7 * x + 0.7 * noise
    bias = torch.linspace(0, 1, shape[1]).view(-1, *[1] * (len(shape) - 2))
    if name == 'nearly one-hot':
        return 30 * x, 30 * y
    if name == 'saturated':
        return 1000 * x, 1000 * y
    if name == 'nearly uniform':
        return 1e-2 * x, 1e-2 * y
    if name == 'more nearly uniform':
        return 1e-4 * x, 1e-4 * y
    if name == 'as initialised':  # RetinaNet's prior: all scores near 0.01
        return 0.1 * x - 4.6, 0.1 * y - 4.6
    if name == 'the same in every row':
        return 1e-3 * x + 5 * bias, 1e-3 * y + 5 * bias
    if name == 'classes that never occur':
        return x - 40 * bias, y - 40 * bias
    if name == 'classes that never occur at all':
        return x - 80 * (bias > 0.5), y - 200 * (bias > 0.5)
    if name == 'background':
        return x + 8 * (bias == 0), y + 8 * (bias == 0)
    return x, y


NAMES = [
    'ordinary',
    'nearly one-hot',
    'saturated',
    'nearly uniform',
    'more nearly uniform',
    'as initialised',
    'the same in every row',
    'classes that never occur',
    'classes that never occur at all',
    'background',
]
# fp32 leaves no digits of these after centring
FLAT = ['more nearly uniform', 'the same in every row']


def run(loss, student, teacher, *args):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, *args)
    value.backward()
    return value.detach(), student.grad


def assert_close(ours, oracle, value_tol=1e-5, grad_tol=1e-4):
    assert ((ours[0] - oracle[0]) / oracle[0]).abs() < value_tol
    # the whole gradient of saturated scores can be below 1e-10
    assert (ours[1] - oracle[1]).norm() < grad_tol * max(oracle[1].norm(), 1e-5)

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr

from mmdist.losses import BinaryKLDivLoss
from mmdist.registry import MODELS


def logits(scale=2.0):
    rng = np.random.default_rng(0)
    return rng.normal(-2, scale, (12, 5)), rng.normal(-2, scale, (12, 5))


def value_and_grad(loss, student, teacher, dtype=torch.float64):
    student = torch.tensor(student, dtype=dtype, requires_grad=True)
    teacher = torch.tensor(teacher, dtype=dtype, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    assert teacher.grad is None
    return value, student.grad


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_value_and_gradient_are_those_of_scipy(tau):
    student, teacher = logits()
    loss = MODELS.build(dict(type='mmdist.BinaryKLDivLoss', tau=tau, loss_weight=3.0))
    value, grad = value_and_grad(loss, student, teacher)
    # 1 - sigmoid(x) is sigmoid(-x)
    entropies = rel_entr(expit(teacher / tau), expit(student / tau))
    entropies += rel_entr(expit(-teacher / tau), expit(-student / tau))
    np.testing.assert_allclose(
        value.item(), 3 * tau**2 * entropies.sum(1).mean(), rtol=1e-10
    )
    slope = expit(student / tau) - expit(teacher / tau)
    np.testing.assert_allclose(grad, 3 * tau * slope / len(student), rtol=1e-10)


def test_it_is_zero_for_the_teacher_itself_and_positive_elsewhere():
    student, teacher = logits()
    value, grad = value_and_grad(BinaryKLDivLoss(), teacher, teacher)
    assert value.item() == 0
    assert not grad.any()
    assert value_and_grad(BinaryKLDivLoss(), student, teacher)[0] > 0


def test_it_sees_a_shift_that_a_softmax_would_not():
    _, teacher = logits()
    value, grad = value_and_grad(BinaryKLDivLoss(), teacher + 1, teacher)
    assert value > 0.01
    assert (grad > 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_computed_in_fp32_and_large_logits_are_finite(dtype):
    student, teacher = logits(scale=100.0)
    value, grad = value_and_grad(BinaryKLDivLoss(), student, teacher, dtype)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_teacher_that_is_not_finite_stops(bad):
    student, teacher = logits()
    teacher[3, 2] = bad
    with pytest.raises(ValueError, match="The teacher's logits contain NaN or inf"):
        value_and_grad(BinaryKLDivLoss(), student, teacher)


def test_it_wants_a_temperature_above_zero():
    with pytest.raises(ValueError, match='tau > 0, got tau=0'):
        BinaryKLDivLoss(tau=0)

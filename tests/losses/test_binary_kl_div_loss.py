from __future__ import annotations

import numpy as np
import pytest
import torch
from predictions import logits, value_and_grad
from scipy.special import expit, rel_entr

from mmdist.losses import BinaryKLDivLoss
from mmdist.registry import MODELS


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_value_and_gradient_are_those_of_scipy(tau):
    student, teacher = logits((12, 5))
    loss = MODELS.build(dict(type='mmdist.BinaryKLDivLoss', tau=tau, loss_weight=3.0))
    value, grad = value_and_grad(loss, student, teacher)
    # 1 - sigmoid(x) is sigmoid(-x)
    entropies = rel_entr(expit(teacher / tau), expit(student / tau))
    entropies += rel_entr(expit(-teacher / tau), expit(-student / tau))
    expected = 3 * tau**2 * entropies.sum(1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    slope = expit(student / tau) - expit(teacher / tau)
    np.testing.assert_allclose(grad, 3 * tau * slope / len(student), rtol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_it_is_computed_in_fp32_and_large_logits_are_finite(dtype):
    student, teacher = logits((12, 5), scale=100.0)
    value, grad = value_and_grad(BinaryKLDivLoss(), student, teacher, dtype=dtype)
    assert value.dtype == torch.float32
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_teacher_that_is_not_finite_stops(bad):
    student, teacher = logits((12, 5))
    teacher[3, 2] = bad
    with pytest.raises(ValueError, match="The teacher's logits contain NaN or inf"):
        value_and_grad(BinaryKLDivLoss(), student, teacher)


def test_it_wants_a_temperature_above_zero():
    with pytest.raises(ValueError, match='tau > 0, got tau=0'):
        BinaryKLDivLoss(tau=0)

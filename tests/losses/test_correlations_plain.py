from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from mmdist.losses.correlations import Settings
from mmdist.losses.correlations.plain import correlations, pearson

SCORES = Settings('identity')


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    a = rng.random((40, 7))
    return a, a + rng.random((40, 7))


@pytest.mark.parametrize('dim', [0, 1])
def test_pearson_is_scipys(pair, dim):
    a, b = pair
    ours = pearson(torch.tensor(a), torch.tensor(b), dim, None, SCORES)
    np.testing.assert_allclose(ours, pearsonr(a, b, axis=dim).statistic, atol=1e-12)


def test_weight_removes_rows(pair):
    a, b = pair
    keep = np.arange(40) % 3 > 0
    got = correlations(*map(torch.tensor, (a, b, keep)), SCORES)
    for dim, ours in zip((1, 0), got, strict=True):
        expected = pearsonr(a[keep], b[keep], axis=dim).statistic.mean()
        assert ours.item() == pytest.approx(expected, 1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('value', [0.0, 1.0, 1 / 3, 0.1, 1e-4, 1 / 1203, 123.456, -7.7])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (100_003, 3), (5, 1203)])
def test_constant_has_no_relation(shape, value, dtype):
    a = torch.full(shape, value, dtype=dtype, requires_grad=True)
    b = torch.rand(shape, dtype=dtype)
    for dim in (0, 1):
        for x, y in ((a, b), (b, a)):
            corr = pearson(x, y, dim, None, SCORES)
            assert (corr == 0).all()
            (grad,) = torch.autograd.grad(corr.sum(), a)
            assert (grad == 0).all()


def test_relation_does_not_depend_on_scale():
    """Classes that hardly ever occur still have a relation."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 50, 3))
    oracle = pearsonr(a, b, axis=0).statistic
    for scale in (1e-3, 1e-6, 1e-9, 1e3, 1e6):
        ours = torch.tensor(a * scale, dtype=torch.float32), torch.tensor(b).float()
        ours = pearson(*ours, 0, None, SCORES)
        np.testing.assert_allclose(ours, oracle, atol=1e-6)

"""Mean, spread and paired differences over seeds, against scipy and statistics."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import scipy.stats

from tools.logs import interval, mean_and_spread, paired


@pytest.mark.parametrize('n', [2, 3, 8])
def test_paired_interval_is_that_of_students_t(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(42, 2, n), rng.normal(40, 2, n)
    result = paired(
        {**dict(enumerate(ours)), 99: 0.0}, {**dict(enumerate(theirs)), 77: 0.0}
    )
    test = scipy.stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    assert result.n == n
    np.testing.assert_allclose(
        result[1:], ((ours - theirs).mean(), low, high), rtol=1e-10
    )


def test_one_seed_has_no_interval():
    assert paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 3.0}) is None
    assert interval(None) == '-'


def test_spread_is_that_of_a_sample():
    values = [35.3, 36.7, 36.7]
    mean, spread = statistics.mean(values), statistics.stdev(values)
    assert mean_and_spread(dict(enumerate(values))) == f'{mean:.2f} ± {spread:.2f}'
    assert mean_and_spread({0: 41.0}) == '41.00'
    assert mean_and_spread({}) == '-'


def test_scores_that_are_fractions_take_more_digits():
    assert mean_and_spread({0: 0.4, 1: 0.5}, digits=4) == '0.4500 ± 0.0707'
    difference = paired({0: 0.2, 1: 0.4}, {0: 0.1, 1: 0.2})
    assert interval(difference, digits=3) == '+0.150 [-0.485, +0.785]'

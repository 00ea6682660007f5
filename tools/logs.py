"""Read training logs: mean and spread over seeds, paired differences."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LOG = '*/vis_data/scalars.json'


def read_log(folder: Path) -> list[dict]:
    """The scalars logged by the runs in a work dir, the first run first."""
    return [
        json.loads(line)
        for file in sorted(folder.glob(LOG))
        for line in file.read_text().splitlines()
        if line.endswith('}')
    ]


class Paired(NamedTuple):
    """The mean of paired differences and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


def paired(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]
) -> Paired | None:
    """Differences of two methods by seed, with Student's t; None below two pairs.

    Args:
        ours: Scores by seed.
        theirs: Scores by seed; seeds that only one of the two has are left out.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    n = len(differences)
    if n < 2:
        return None
    mean = np.mean(differences)
    half = stdtrit(n - 1, 0.975) * np.std(differences, ddof=1) / np.sqrt(n)
    return Paired(n, float(mean), float(mean - half), float(mean + half))


def mean_and_spread(scores: Mapping[Hashable, float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds; a dash for none."""
    values = list(scores.values())
    if not values:
        return '-'
    spread = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{spread}'


def interval(difference: Paired | None, digits: int = 2) -> str:
    """The mean of the differences and its interval; a dash for none."""
    if difference is None:
        return '-'
    mean, low, high = (f'{value:+.{digits}f}' for value in difference[1:])
    return f'{mean} [{low}, {high}]'

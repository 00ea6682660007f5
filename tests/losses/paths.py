"""The code paths of DISTLoss."""

from __future__ import annotations

import functools

import pytest
import torch

from mmdist.losses.correlations import Path, cpu

INTERPRETED = not torch.cuda.is_available()  # see conftest.py
PATHS = [
    'plain',
    'cpu',
    'cpu in many tiles',
    # slow when interpreted; the quick tests are in test_correlations_gpu.py
    pytest.param(
        'gpu',
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                not INTERPRETED, reason='kernels are compiled, these logits on a CPU'
            ),
        ],
    ),
]


def of(name: str, tile_size: int = 40) -> Path:
    """The value of ``DISTLoss.path`` for a path's name."""
    if name == 'cpu in many tiles':
        return functools.partial(cpu.correlations, tile_size=tile_size)
    return name

"""The code paths of DISTLoss."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from predictions import INTERPRETED

from mmdist.losses import DISTLoss
from mmdist.losses.correlations import cpu

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


@pytest.fixture(params=PATHS)
def path(request) -> str:
    return request.param


@pytest.fixture
def loss_on(monkeypatch) -> Callable[..., DISTLoss]:
    """Builds the loss with a code path, and tiles (of this test) of a size."""

    def build(path: str, tile_size: int | None = None, **kwargs) -> DISTLoss:
        if tile_size is not None:
            monkeypatch.setattr(cpu, 'MIN_TILE', tile_size)
            monkeypatch.setattr(cpu, 'MAX_TILE', tile_size)
        loss = DISTLoss(**kwargs)
        loss.path = path
        return loss

    return build


@pytest.fixture
def make_loss(path, loss_on) -> Callable[..., DISTLoss]:
    """Builds the loss with one of the code paths."""
    if path == 'cpu in many tiles':
        return functools.partial(loss_on, 'cpu', 40)
    return functools.partial(loss_on, path)

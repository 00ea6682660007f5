"""The ways in which DISTLoss is computed, to be put in place of its `choose_path`."""

from __future__ import annotations

import pytest
import torch

from mmdist.losses import dist_loss
from mmdist.losses.correlations import gpu as fused_gpu

INTERPRETED = not torch.cuda.is_available()  # see conftest.py


def plain(student, teacher, activation):
    return dist_loss.correlations


def kernels(student, teacher, activation):
    """Those for a GPU; where there is none, Triton interprets them."""
    if not (INTERPRETED or student.is_cuda):
        pytest.skip('the kernels are compiled here, and these logits are on a CPU')
    return fused_gpu.correlations if student.numel() else dist_loss.correlations

"""The ways in which DISTLoss is computed, to be put in place of its `choose_path`."""

from __future__ import annotations

from mmdist.losses import dist_loss, fused_gpu


def plain(student, teacher, activation):
    return dist_loss.correlations


def kernels(student, teacher, activation):
    """Those for a GPU; on a CPU Triton interprets them."""
    return fused_gpu.correlations if student.numel() else dist_loss.correlations

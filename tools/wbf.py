"""Weighted boxes fusion (Solovyev et al., 2021, arXiv 1910.13302)."""

from __future__ import annotations

import numpy as np


def fuse(rows: np.ndarray, models: int, min_iou: float = 0.55) -> np.ndarray:
    """Fuse what several models found in one image.

    Boxes of a class that overlap become one: its coordinates are their mean, weighted
    by their scores; its score is the mean of theirs, times the share of the models that
    found it. A box joins the fused box that it overlaps most, with more than
    ``min_iou``; those with high scores come first.

    Args:
        rows: The boxes of all models, (M, 6), x1 y1 x2 y2 score label.
        models: How many these are.
        min_iou: The IoU.

    Returns:
        (K, 6), the highest score first.
    """
    rows = rows[np.argsort(-rows[:, 4], kind='stable')].astype(np.float64)
    fused = [
        _fuse_class(rows[rows[:, 5] == label], models, min_iou)
        for label in np.unique(rows[:, 5])
    ]
    fused = np.concatenate([*fused, np.empty((0, 6))])
    return fused[np.argsort(-fused[:, 4], kind='stable')]


def _fuse_class(rows: np.ndarray, models: int, min_iou: float) -> np.ndarray:
    fused = rows.copy()
    sums, found = np.zeros((len(rows), 5)), np.zeros(len(rows))
    number = 0
    for *box, score, _ in rows:
        overlaps = _overlaps(np.array(box), fused[:number, :4])
        best = overlaps.argmax() if number else 0
        if not number or overlaps[best] <= min_iou:
            best = number
            number += 1
        sums[best] += score * np.array([*box, 1.0])
        found[best] += 1
        if sums[best, 4]:  # else all scores are 0
            fused[best, :4] = sums[best, :4] / sums[best, 4]
        fused[best, 4] = sums[best, 4] / found[best]
    fused[:, 4] *= np.minimum(found, models) / models
    return fused[:number]


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with each of several."""
    inner = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = inner.clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return both / np.maximum((box[2:] - box[:2]).prod() + areas - both, 1e-9)

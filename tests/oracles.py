"""One step of a model, and numpy oracles without code of mmdist, mmdet or mmseg."""

from __future__ import annotations

import numpy as np
import pytest
from det_zoo import batch
from scipy.stats import pearsonr
from torch import nn

from mmdist import Pair
from mmdist.record import Recorder
from mmdist.teachers import ClassMatch, match_classes

SIZES = ((96, 96), (72, 96))  # the second image is padded


def step(model: nn.Module, data: dict | None = None) -> tuple[dict, list[Pair]]:
    """Run one loss pass; return its losses and the pairs of its only comparison."""
    (comparison,) = model.distill.values()
    data = batch(model, SIZES) if data is None else data
    with Recorder([comparison]) as recorder:
        losses = model(**data, mode='loss')
    return losses, recorder.calls(comparison)[0].args[1]


def reversed_classes() -> ClassMatch:
    """The match of a teacher that has the student's 80 classes in reverse order."""
    names = [f'class {i}' for i in range(80)]
    return match_classes(names, names[::-1])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 if undefined: fewer than two entries, or all equal."""
    if len(a) < 2 or any(np.linalg.norm(x - x.mean()) < 1e-6 for x in (a, b)):
        return 0.0
    return pearsonr(a, b)[0]


def correlations(student: np.ndarray, teacher: np.ndarray) -> tuple[float, float]:
    """Mean correlation over the rows, and over the columns."""
    return tuple(
        np.mean([correlation(s, t) for s, t in zip(*both, strict=True)])
        for both in ((student, teacher), (student.T, teacher.T))
    )


def dist(student: np.ndarray, teacher: np.ndarray) -> float:
    """The published DIST loss of two matrices of probabilities."""
    return 2 - sum(correlations(student, teacher)) if len(student) else 0.0


def assert_terms(
    losses: dict, inter: float, intra: float, tol: float = 1e-4, name: str = 'dist'
) -> None:
    """Check the loss and both correlations of a comparison with DIST."""
    keys = f'{name}_inter', f'{name}_intra', f'loss_{name}'
    expected = pytest.approx([inter, intra, 2 - inter - intra], abs=2 * tol)
    assert [losses[key].item() for key in keys] == expected


def corners(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes from centre and size to x1 y1 x2 y2."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([centre - size / 2, centre + size / 2], 1)


def centres(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes from x1 y1 x2 y2 to centre and size."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], 1)


def overlaps(a: np.ndarray, b: np.ndarray, generalized: bool = False) -> np.ndarray:
    """IoU of each box of a with each of b; GIoU as in CVPR 2019, algorithm 1."""
    a, b = a[:, None], b[None]

    def area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (high - low).clip(0).prod(-1)

    both = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:]))
    return both / union - ((hull - union) / hull if generalized else 0)

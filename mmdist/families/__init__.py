"""Read models: one file per family.

A family's file knows its heads, activations, anchors, proposals or queries, but nothing
of losses. A detector family's file also has what ``mmdist.Detections`` needs:

- ``modules(model, refuse)``: the modules of a student to record.
- ``places(step)``: where the student scored the classes, and how; see :class:`Places`.
- ``ASSIGNED``: how detections are assigned to these places, one of ``'overlap'``,
  ``'overlap or best'`` and ``'one to one'``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from mmdist.lookup import by_class_name

SEG, DENSE, ROI, QUERY = 'seg', 'dense', 'roi', 'query'
# The file in this folder that reads a model, by the model's class.
FAMILIES: dict[str, str] = {
    'EncoderDecoder': SEG,
    'MultimodalEncoderDecoder': SEG,
    'MaskFormer': SEG,
    'SingleStageDetector': DENSE,
    'SingleStageInstanceSegmentor': DENSE,
    'SparseRCNN': QUERY,
    'TwoStageDetector': ROI,
    'DetectionTransformer': QUERY,
}

# Builds the error for a model that cannot be read, from the model and the reason.
Refuse = Callable[[nn.Module, str], Exception]


class Places(NamedTuple):
    """Where a detector scores the classes: anchors, proposals or queries.

    Each place is a row of one term of a loss.
    """

    scores: Tensor  # (rows, common classes), probabilities without background
    boxes: Tensor  # (rows, 4), x1 y1 x2 y2 in pixels
    images: Tensor  # (rows,), the image's index in the batch
    mask: Tensor | None = None  # (rows,), True where a row counts; None counts all
    weight: float = 1.0  # of the term
    name: str = ''  # of the term


def family_of(model: nn.Module) -> str | None:
    """The family of a model; None for an unknown one."""
    return by_class_name(model, FAMILIES)


def reader_of(model: nn.Module) -> ModuleType | None:
    """The file in this folder that reads a model; None for an unknown family."""
    family = family_of(model)
    return None if family is None else import_module(f'{__name__}.{family}')


def name_of(model: nn.Module) -> str:
    """The name of a model's class; for a distilled student, of the plain class."""
    return type(model).__name__.removeprefix('Distilled')


def unreadable(model: nn.Module, reason: str) -> ValueError:
    """The error for a model that cannot be read, outside of any comparison."""
    return ValueError(f'mmdist cannot read a {name_of(model)}: {reason}.')

"""What is compared if `distill` is omitted."""

from __future__ import annotations

from torch import nn

from mmdist.lookup import by_class_name
from mmdist.registry import MODELS
from mmdist.teachers import Teacher

from .base import Comparison

SEG, DENSE, ROI, QUERIES, BOXES = (
    f'mmdist.{name}Logits' for name in ('Seg', 'Dense', 'RoI', 'Query', 'Box')
)
# The comparison of each family, by the class of the model.
KINDS: dict[str, str] = {
    'EncoderDecoder': SEG,
    'MultimodalEncoderDecoder': SEG,
    'MaskFormer': SEG,
    'SingleStageDetector': DENSE,
    'SingleStageInstanceSegmentor': DENSE,
    'SparseRCNN': QUERIES,
    'TwoStageDetector': ROI,
    'DetectionTransformer': QUERIES,
}


def kind_of(model: nn.Module) -> str | None:
    """The comparison of a model's own family; None for an unknown family."""
    return by_class_name(model, KINDS)


def default_for(student: nn.Module) -> dict:
    """Config of the comparison for a student and a teacher of its family.

    Raises:
        ValueError: The family is not known.
    """
    kind = kind_of(student)
    if kind is None:
        raise ValueError(
            f'mmdist does not know what to compare for a {type(student).__name__}: '
            'neither it nor a base class of it is among the supported families '
            f'({", ".join(KINDS)}). Say what to compare, '
            '`distill=dict(<name>=dict(type=...))`. For a comparison of your own see '
            'docs/own_comparison.md.'
        )
    return dict(type=kind)


def default_for_pair(student: nn.Module, teacher: Teacher) -> tuple[Comparison, str]:
    """The comparison of the student's family, or of boxes if the teacher is no match.

    Args:
        student: The student.
        teacher: The teacher, loaded.

    Returns:
        The comparison, and why it is that one.

    Raises:
        ValueError: Neither works; it says why.
    """
    comparison, boxes = (
        MODELS.build(cfg) for cfg in (default_for(student), dict(type=BOXES))
    )
    try:
        comparison.bind(student, teacher)
        comparison.check_pair(student, teacher.model)
        return comparison, 'student and teacher are of one kind'
    except ValueError as error:
        if SEG in (kind_of(student), kind_of(teacher.model)):
            raise
        reason = error
    try:
        boxes.bind(student, teacher)
        boxes.check_pair(student, teacher.model)
    except ValueError as error:
        raise ValueError(
            f'{reason}\nNor can boxes be compared. {error}\nmmdist.Features compares '
            'feature maps of any two models, `distill=dict(mimic=dict('
            "type='mmdist.Features', student='neck'))`."
        ) from None
    return boxes, str(reason).split('. ')[0]

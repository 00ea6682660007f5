"""What is compared if `distill` is omitted."""

from __future__ import annotations

from torch import nn

from mmdist.lookup import by_class_name
from mmdist.registry import MODELS
from mmdist.teachers import Teacher

from .base import Comparison

SEG, DENSE, ROI, QUERIES = (
    f'mmdist.{name}Logits' for name in ('Seg', 'Dense', 'RoI', 'Query')
)
DETECTIONS = 'mmdist.Detections'
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
    """What is compared for a student and its teacher.

    It is the comparison of the student's family. If the teacher is no match, it is what
    the teacher detects (``Detections``).

    Args:
        student: The student.
        teacher: The teacher, loaded.

    Returns:
        The comparison, and why it is that one.

    Raises:
        ValueError: None works; it says why.
    """
    own = default_for(student)['type']
    reasons: list[str] = []
    for kind in (own, DETECTIONS):
        comparison = MODELS.build(dict(type=kind))
        try:
            comparison.bind(student, teacher)
            comparison.check_pair(student, teacher.model)
        except ValueError as error:
            if SEG in (own, kind_of(teacher.model)):
                raise
            reasons.append(str(error))
            continue
        if reasons:
            return comparison, reasons[0].split('. ')[0]
        return comparison, 'student and teacher are of one kind'
    raise ValueError(
        f'{reasons[0]}\nNor can detections be compared. {reasons[1]}\n'
        'mmdist.Features compares feature maps of any two models, '
        "`distill=dict(mimic=dict(type='mmdist.Features', student='neck'))`."
    )

"""What is compared if `distill` is omitted."""

from __future__ import annotations

from torch import nn

from mmdist.families import DENSE, FAMILIES, QUERY, ROI, SEG, family_of
from mmdist.registry import MODELS
from mmdist.teachers import Teacher

from .base import Comparison

DETECTIONS = 'mmdist.Detections'
# The comparison of each family; that of any other is Detections.
KINDS: dict[str, str] = {
    SEG: 'mmdist.SegLogits',
    DENSE: 'mmdist.DenseLogits',
    ROI: 'mmdist.RoILogits',
    QUERY: 'mmdist.QueryLogits',
}


def default_for(student: nn.Module) -> dict:
    """Config of the comparison for a student and a teacher of its family.

    Raises:
        ValueError: The family is not known.
    """
    family = family_of(student)
    if family is None:
        raise ValueError(
            f'mmdist does not know what to compare for a {type(student).__name__}: '
            'neither it nor a base class of it is among the supported families '
            f'({", ".join(FAMILIES)}). Say what to compare, '
            '`distill=dict(<name>=dict(type=...))`. For a comparison of your own see '
            'docs/own_comparison.md.'
        )
    return dict(type=KINDS.get(family, DETECTIONS))


def default_for_pair(student: nn.Module, teacher: Teacher) -> tuple[Comparison, str]:
    """What is compared for a student and its teacher.

    It is the comparison of the student's family, and if the teacher is no match, what
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
    for kind in dict.fromkeys((own, DETECTIONS)):
        comparison = MODELS.build(dict(type=kind))
        try:
            comparison.bind(student, teacher)
            comparison.check_pair(student, teacher.model)
        except ValueError as error:
            if SEG in (family_of(student), family_of(teacher.model)):
                raise
            reasons.append(str(error))
            continue
        if reasons:
            return comparison, reasons[0].split('. ')[0]
        return comparison, 'student and teacher are of one kind'
    raise ValueError(
        f'{reasons[0]}\nNor can detections be compared. {reasons[-1]}\n'
        'mmdist.Features compares feature maps of any two models, '
        "`distill=dict(mimic=dict(type='mmdist.Features', student='neck'))`."
    )

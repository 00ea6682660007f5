"""The default comparisons, for a config without `distill`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mmdist.families import DENSE, FAMILIES, QUERY, ROI, SEG, family_of
from mmdist.registry import MODELS
from mmdist.teachers import Teacher

from .base import Comparison

DETECTIONS = 'mmdist.Detections'
# The comparison of each family; any other family gets Detections.
KINDS: dict[str, str] = {
    SEG: 'mmdist.SegLogits',
    DENSE: 'mmdist.DenseLogits',
    ROI: 'mmdist.RoILogits',
    QUERY: 'mmdist.QueryLogits',
}
# Families that also gained from the teacher's boxes, and what the class comparison
# changes with them; the evidence is in docs/which_comparison.md.
WITH_BOXES: dict[str, dict] = {
    DENSE: {},
    ROI: dict(loss=dict(type='mmdist.DISTLoss', beta=0.0)),
}


class Chosen(NamedTuple):
    """A comparison chosen for ``distill``, and the reason as a clause."""

    comparison: Comparison
    why: str


def default_for(student: nn.Module) -> dict:
    """Config of the comparison for a student and a teacher of the same family.

    Raises:
        ValueError: The family is unknown.
    """
    family = family_of(student)
    if family is None:
        raise ValueError(
            f'mmdist does not know what to compare for a {type(student).__name__}: '
            'neither it nor a base class of it is among the supported families '
            f'({", ".join(FAMILIES)}). Set `distill=dict(<name>=dict(type=...))`. For '
            'your own comparison see docs/own_comparison.md.'
        )
    return dict(type=KINDS.get(family, DETECTIONS))


def default_for_pair(
    student: nn.Module, teacher: Teacher, published: bool = False
) -> dict[str, Chosen]:
    """Choose the comparisons for a student and its teacher, by what gained most.

    ``dist`` is the comparison of the student's family or, if the teacher does not fit,
    ``Detections``. ``box`` compares boxes, if the family gained from that and the pair
    supports it.

    Args:
        student: The student.
        teacher: The teacher, loaded.
        published: Choose DIST as published: no boxes, both of its terms.

    Returns:
        The entries of ``distill`` by name.

    Raises:
        ValueError: No comparison works; the message says why.
    """
    family = family_of(student)
    own, has_recipe = default_for(student), family in WITH_BOXES and not published
    if has_recipe:
        own |= WITH_BOXES[family]
    comparison, misfit = _built(own, student, teacher)
    if misfit:
        if SEG in (family, family_of(teacher.model)):
            raise misfit
        detections, other = _built(dict(type=DETECTIONS), student, teacher)
        if other:
            raise ValueError(
                f'{misfit}\nDetections cannot be compared either. {other}\n'
                'mmdist.Features compares feature maps of any two models: '
                "`distill=dict(mimic=dict(type='mmdist.Features', student='neck'))`."
            )
        return dict(dist=Chosen(detections, str(misfit).split('. ')[0]))
    why = 'student and teacher are of the same family'
    if not has_recipe:
        return dict(dist=Chosen(comparison, why))
    cfg, with_views = dict(type='mmdist.Boxes'), bool(teacher.views)
    boxes, misfit = _built(cfg, student, teacher, with_views)
    if misfit:
        why += f'; boxes are left out: {str(misfit).split(". ")[0]}'
        return dict(dist=Chosen(comparison, why))
    box_why = 'class scores do not say where a box ends'
    return dict(dist=Chosen(comparison, why), box=Chosen(boxes, box_why))


def _built(
    cfg: dict, student: nn.Module, teacher: Teacher, with_views: bool = False
) -> tuple[Comparison | None, ValueError | None]:
    """A comparison of a pair, or the error that says why it cannot compare the two."""
    comparison = MODELS.build(cfg)
    try:
        comparison.bind(student, teacher)
        comparison.check_pair(student, teacher.model)
        if with_views:
            comparison.check_views()
    except ValueError as error:
        return None, error
    return comparison, None

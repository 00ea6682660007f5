"""When the teacher runs in a step, on real detectors."""

from __future__ import annotations

import weakref

import pytest
from det_zoo import batch, build_pair

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
DETR = 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
DENSE = dict(type='mmdist.DenseLogits')


def order_of(model) -> list[str]:
    """Whose features are computed first; 'late' if the teacher's are still kept."""
    order, features = [], []

    def teacher(module, args, output):
        order.append('teacher')
        features.extend(weakref.ref(x) for x in output)

    def student(module, args, output):
        order.append('student')
        if any(ref() is not None for ref in features):
            order.append('late')

    hooks = [
        model.teacher.model.neck.register_forward_hook(teacher),
        model.neck.register_forward_hook(student),
    ]
    model(**batch(model), mode='loss')
    for hook in hooks:
        hook.remove()
    return order


@pytest.mark.parametrize('path', [RETINANET, DETR])
def test_teacher_answers_and_rests_before_the_student_runs(path):
    assert order_of(build_pair(path)) == ['teacher', 'student']


def test_of_the_features_those_that_are_compared_are_kept():
    mimic = dict(type='mmdist.Features', student='backbone.layer1')
    model = build_pair(RETINANET, distill=dict(mimic=mimic))
    assert order_of(model) == ['teacher', 'student']


@pytest.mark.parametrize('first', [True, False])
def test_features_are_kept_for_who_asks_later(first):
    other = dict(type='mmdist.Features', student='neck')
    both = dict(dist=DENSE, mimic=other) if first else dict(mimic=other, dist=DENSE)
    model = build_pair(RETINANET, distill=both)
    assert order_of(model) == ['teacher', 'student', 'late']


def test_teacher_of_proposals_waits_for_them():
    assert order_of(build_pair(FASTER)) == ['student', 'teacher']

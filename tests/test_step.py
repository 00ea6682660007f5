"""When the teacher runs in a step, on real detectors."""

from __future__ import annotations

import weakref

import pytest
from det_zoo import batch, build_pair

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
DETR = 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
DENSE = dict(type='mmdist.DenseLogits')
LAYER, NECK = (
    dict(type='mmdist.Features', student=path) for path in ('backbone.layer1', 'neck')
)


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


@pytest.mark.parametrize(
    ('path', 'distill', 'order'),
    [
        (RETINANET, None, ['teacher', 'student']),
        (DETR, None, ['teacher', 'student']),
        # of the features, those that are compared are kept
        (RETINANET, dict(mimic=LAYER), ['teacher', 'student']),
        # they are kept for who asks later
        (RETINANET, dict(dist=DENSE, mimic=NECK), ['teacher', 'student', 'late']),
        (RETINANET, dict(mimic=NECK, dist=DENSE), ['teacher', 'student', 'late']),
        # a teacher of proposals waits for them
        (FASTER, None, ['student', 'teacher']),
    ],
)
def test_the_teacher_answers_and_rests_before_the_student_runs(path, distill, order):
    assert order_of(build_pair(path, distill=distill)) == order

"""What is compared where `distill` is omitted, and what mmdist compares no more."""

from __future__ import annotations

import pytest
from det_zoo import FAMILIES, batch, build_pair

from mmdist.registry import MODELS

SIZES = ((96, 96), (72, 96))


@pytest.mark.parametrize(
    ('student', 'teacher', 'kind'),
    [
        ('RetinaNet', 'RetinaNet', 'DenseLogits'),
        ('RetinaNet', 'FCOS', 'Detections'),
        ('RetinaNet', 'Cascade R-CNN', 'Detections'),
        ('Faster R-CNN', 'Cascade R-CNN', 'RoILogits'),
        ('Faster R-CNN', 'Deformable DETR', 'Detections'),
        ('Deformable DETR', 'Sparse R-CNN', 'QueryLogits'),
        ('DETR', 'TOOD', 'Detections'),
    ],
)
def test_the_pair_decides_what_is_compared(student, teacher, kind):
    paths = FAMILIES[student], FAMILIES[teacher]
    model = build_pair(*paths, sizes=SIZES)
    assert type(model.distill['dist']).__name__ == kind
    assert 'loss_dist' in model(**batch(model, SIZES), mode='loss')


def test_what_cannot_be_compared_is_refused_with_what_can():
    message = (
        r'(?s)DenseLogits cannot compare a FasterRCNN.*\nNor can detections be compared'
        r'.*Detections cannot compare a CenterNet: .*\nmmdist\.Features compares'
    )
    with pytest.raises(ValueError, match=message):
        build_pair(FAMILIES['CenterNet'], FAMILIES['Faster R-CNN'])


@pytest.mark.parametrize(
    ('kind', 'arguments', 'message'),
    [
        ('BoxDistributions', dict(min_score=1.0), '`min_score` is a probability'),
        ('Boxes', dict(min_score=1.0), '`min_score` is a probability'),
        ('DenseLogits', dict(anchors='all'), "`anchors` is 'joint' or 'separate', got"),
        ('DenseLogits', dict(anchors='best'), r'`anchors=.*Take mmdist\.Detections'),
        ('DenseLogits', dict(levels='mean'), "`levels` is 'sum' or 'concat'"),
        ('DenseLogits', dict(score='both'), "`score` is 'class' or 'joint'"),
        ('Detections', dict(min_iou=1.0), '`min_iou` is an IoU'),
        ('Masks', dict(min_score=-0.1), '`min_score` is a probability'),
        ('QueryLogits', dict(layers='first'), "`layers` is 'last' or 'all'"),
        ('QueryLogits', dict(min_score=1.5), '`min_score` is a probability'),
        ('RoILogits', dict(stage='last'), "`stage` is an int, 'mean' or None"),
        ('SegLogits', dict(resize='larger'), "`resize` of SegLogits is 'smaller'"),
    ],
)
def test_options_out_of_range(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type=f'mmdist.{kind}', **arguments))


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(type='mmdist.BoxLogits'), r'distill\.dist`: .* Take mmdist\.Detections'),
        (dict(type='mmdist.SegLogits', max_rows=9), "no argument 'max_rows'.* resize"),
        (
            dict(
                type='mmdist.DenseLogits',
                loss=dict(type='mmdist.DISTLoss', damping=1.0),
            ),
            r'distill\.dist\.loss`: `damping` .* leave it out\. `model\.balance`',
        ),
    ],
)
def test_what_is_no_more_has_a_sentence(entry, message):
    with pytest.raises(ValueError, match=message):
        build_pair(FAMILIES['RetinaNet'], distill=dict(dist=entry))

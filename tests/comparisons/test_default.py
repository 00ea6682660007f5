"""What is compared if `distill` is omitted, and errors for wrong or removed options."""

from __future__ import annotations

import pytest
from det_zoo import FAMILIES, batch, build_pair
from oracles import SIZES

from mmdist.comparisons.default import default_for_pair
from mmdist.registry import MODELS

WITH_INTER = ('DenseLogits', 'QueryLogits')


@pytest.mark.parametrize(
    ('student', 'teacher', 'kinds'),
    [
        ('RetinaNet', 'RetinaNet', dict(dist='DenseLogits', box='Boxes')),
        ('RetinaNet', 'FCOS', dict(dist='Detections')),
        ('RetinaNet', 'Cascade R-CNN', dict(dist='Detections')),
        ('SOLO', 'SOLO', dict(dist='DenseLogits')),
        ('Faster R-CNN', 'Cascade R-CNN', dict(dist='RoILogits', box='Boxes')),
        ('Faster R-CNN', 'Deformable DETR', dict(dist='Detections')),
        ('Deformable DETR', 'Sparse R-CNN', dict(dist='QueryLogits')),
        ('DETR', 'TOOD', dict(dist='Detections')),
    ],
)
def test_the_pair_decides_what_is_compared(student, teacher, kinds):
    """The default recipe, and what DIST was published with."""
    paths = FAMILIES[student], FAMILIES[teacher]
    model = build_pair(*paths, sizes=SIZES, balance=3.0)
    assert {name: type(c).__name__ for name, c in model.distill.items()} == kinds
    assert model.distill['dist'].loss.beta == (kinds['dist'] in WITH_INTER)
    why = model.why_default['dist']
    assert why.startswith('student and teacher are of the same family') == (
        kinds['dist'] != 'Detections'
    )
    assert ('boxes are left out: Boxes cannot compare' in why) == (student == 'SOLO')
    losses = model(**batch(model, SIZES), mode='loss')
    assert {f'loss_{name}' for name in kinds} <= losses.keys()

    published = default_for_pair(model, model.teacher, published=True)
    assert {n: type(c.comparison).__name__ for n, c in published.items()} == {
        'dist': kinds['dist']
    }
    assert published['dist'].comparison.loss.beta == (kinds['dist'] != 'Detections')


def test_without_balance_it_is_the_published_loss():
    model = build_pair(FAMILIES['RetinaNet'], sizes=SIZES, balance=None)
    assert list(model.distill) == ['dist']


def test_what_cannot_be_compared_is_refused_with_what_can():
    message = (
        r'(?s)DenseLogits cannot compare a FasterRCNN.*\nDetections cannot be compared '
        r'either.*Detections cannot compare a CenterNet: .*\nmmdist\.Features compares'
    )
    with pytest.raises(ValueError, match=message):
        build_pair(FAMILIES['CenterNet'], FAMILIES['Faster R-CNN'])


@pytest.mark.parametrize(
    ('kind', 'arguments', 'message'),
    [
        ('BoxDistributions', dict(min_score=1.0), '`min_score` must satisfy'),
        ('Boxes', dict(min_score=1.0), '`min_score` must satisfy'),
        ('DenseLogits', dict(anchors='all'), "`anchors` must be 'joint' or 'separate'"),
        ('DenseLogits', dict(anchors='best'), r'`anchors=.*Use mmdist\.Detections'),
        ('DenseLogits', dict(levels='mean'), "`levels` must be 'sum' or 'concat'"),
        ('DenseLogits', dict(score='both'), "`score` must be 'class' or 'joint'"),
        ('Detections', dict(min_iou=1.0), '`min_iou` must satisfy'),
        ('Masks', dict(min_score=-0.1), '`min_score` must satisfy'),
        ('QueryLogits', dict(layers='first'), "`layers` must be 'last' or 'all'"),
        ('QueryLogits', dict(min_score=1.5), '`min_score` must satisfy'),
        ('RoILogits', dict(stage='last'), "`stage` must be an int, 'mean' or None"),
        ('SegLogits', dict(resize='larger'), "`resize` of SegLogits must be 'smaller'"),
    ],
)
def test_options_out_of_range(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type=f'mmdist.{kind}', **arguments))


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(type='mmdist.BoxLogits'), r'distill\.dist`: .* Use mmdist\.Detections'),
        (dict(type='mmdist.SegLogits', max_rows=9), "unknown .* 'max_rows'.* resize"),
        (
            dict(
                type='mmdist.DenseLogits',
                loss=dict(type='mmdist.DISTLoss', damping=1.0),
            ),
            r'distill\.dist\.loss`: `damping` .* omit it\. `model\.balance`',
        ),
    ],
)
def test_what_is_no_more_has_a_sentence(entry, message):
    with pytest.raises(ValueError, match=message):
        build_pair(FAMILIES['RetinaNet'], distill=dict(dist=entry))

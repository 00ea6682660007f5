from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from builders import assert_learns, slow
from det_zoo import FAMILIES, SIZES, batch, build_pair, model_config
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from oracles import dist, step
from scipy.special import expit, softmax
from torch import nn
from torch.utils._pytree import tree_map

from mmdist.families import dense as family
from mmdist.losses import as_rows as as_matrix
from mmdist.registry import MODELS
from mmdist.teachers import match_classes

RETINANET, FASTER, FCOS, YOLOV3, TOOD, ATSS, GFL, PAA, RTMDET, VFNET, YOLOX, SOLO = (
    FAMILIES[name]
    for name in (
        *('RetinaNet', 'Faster R-CNN', 'FCOS', 'YOLOv3', 'TOOD', 'ATSS', 'GFL', 'PAA'),
        *('RTMDet', 'VFNet', 'YOLOX', 'SOLO'),
    )
)
YOLOF = 'yolof/yolof_r50-c5_8xb8-1x_coco.py'
YOLACT = 'yolact/yolact_r50_1xb8-55e_coco.py'
SABL = 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'
GUIDED = 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py'
CORNERNET = 'cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py'
CASCADE_RPN = 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'
PADDED = ((64, 64), (48, 40))
STRIDES = (8, 16, 32, 64, 64)  # the last level has one location, not half of one
EXACT = dict(type='mmdist.DISTLoss', eps=0)


def dense(**kwargs) -> dict:
    return dict(dist=dict(type='mmdist.DenseLogits', **kwargs))


def raw_outputs(model: nn.Module, data: dict, head: str = 'bbox_head') -> list:
    """Per level, what the two heads return, by the models' own forward."""
    sizes = [sample.img_shape for sample in data['data_samples']]
    inputs = data['inputs'], model.teacher.renormalize(data['inputs'], sizes)
    with torch.no_grad():
        sides = [
            getattr(side, head)(side.extract_feat(images))[0]
            for side, images in zip((model, model.teacher.model), inputs, strict=True)
        ]
    return [[x.double().numpy() for x in level] for level in zip(*sides, strict=True)]


def as_rows(level: np.ndarray, stride: float | None = None, sizes=SIZES) -> np.ndarray:
    """A row per location; with a stride, only those centred inside their image."""
    _, _, *cells = level.shape
    rows = level.transpose(0, 2, 3, 1)
    if stride is None:
        return rows.reshape(-1, rows.shape[-1])
    y, x = ((np.arange(n) + 0.5) * stride for n in cells)
    return rows[np.stack([(y < h)[:, None] & (x < w) for h, w in sizes])]


def check(model, data, student, teacher=None, strides=None, head='bbox_head', tol=1e-3):
    """Check that the loss is numpy's DIST of rows of scores, summed over the levels.

    Args:
        student: Turns rows of the student's channels into rows of scores.
        teacher: The same for the teacher; None takes the student's.
        strides: Strides of the levels, to leave out padding; None includes it.
    """
    losses = model(**data, mode='loss')
    expected = 0.0
    levels = raw_outputs(model, data, head)
    for level, stride in zip(levels, strides or [None] * len(levels), strict=True):
        ours, theirs = (as_rows(x, stride) for x in level)
        expected += dist(student(ours), (teacher or student)(theirs))
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=tol)


@pytest.mark.parametrize(
    ('anchors', 'levels', 'mask'),
    [
        ('joint', 'sum', True),
        ('joint', 'sum', False),  # as published
        ('separate', 'concat', True),
        *slow([('separate', 'sum', True), ('joint', 'concat', False)]),
    ],
)
def test_rows_of_retinanet_against_numpy(anchors, levels, mask):
    distill = dense(anchors=anchors, levels=levels, ignore_mask=mask, loss=EXACT)
    model = build_pair(RETINANET, distill=distill, edit=first_levels, sizes=PADDED)
    data = batch(model, PADDED)
    losses = model(**data, mode='loss')
    rows = []
    for level, stride in zip(raw_outputs(model, data), STRIDES[:3], strict=True):
        both = [as_rows(x, stride if mask else None, PADDED) for x in level]
        assert both[0].shape[1] == 9 * 80
        rows.append(
            [expit(x if anchors == 'joint' else x.reshape(-1, 80)) for x in both]
        )
    if levels == 'concat':
        rows = [[np.concatenate(side) for side in zip(*rows, strict=True)]]
    expected = sum(dist(student, teacher) for student, teacher in rows)
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


def first_levels(cfg, *_):
    """Keep three of five levels: the last two have one location in such images."""
    cfg.neck.num_outs = 3
    cfg.neck.add_extra_convs = False
    cfg.bbox_head.anchor_generator.strides = [8, 16, 32]


@pytest.mark.parametrize('anchors', ['joint', 'separate'])
def test_softmax_is_over_the_classes_of_one_anchor(anchors):
    """YOLACT has 3 anchors of 80 classes and a background."""

    def scores(rows):
        each = softmax(rows.reshape(-1, 81), axis=1)
        return each.reshape(-1, 3 * 81) if anchors == 'joint' else each

    sizes = ((64, 64), (64, 64))
    model = build_pair(YOLACT, distill=dense(anchors=anchors, loss=EXACT), sizes=sizes)
    # The last level has two rows, where rounding can decide between 1 and -1.
    check(model, batch(model, sizes), scores, tol=1e-2)


def test_yolov3_is_split_into_box_objectness_and_classes():
    sizes = ((96, 96), (96, 96))
    distill = dense(anchors='separate', loss=EXACT)
    model = build_pair(YOLOV3, distill=distill, sizes=sizes)
    check(model, batch(model, sizes), lambda x: expit(x.reshape(-1, 4 + 1 + 80)[:, 5:]))


def test_heads_that_return_probabilities_are_not_squashed_again():
    def scores(rows):
        assert rows.min() >= 0 and rows.max() <= 1
        return rows

    model = build_pair(TOOD, distill=dense(loss=EXACT))
    assert model.distill['dist'].loss.activation == 'identity'
    check(model, batch(model), scores, strides=STRIDES)


@pytest.mark.parametrize('path', [SOLO, GUIDED], ids=['SOLO', 'GA-RetinaNet'])
def test_heads_that_filter_in_eval_are_asked_as_in_training(path):
    """SOLO suppresses neighbours, guided anchoring skips locations (one image only)."""
    model = build_pair(path, distill=dense(), factors=(8, 8))
    teacher = model.teacher.model
    teacher.load_state_dict(model.state_dict())
    _, pairs = step(model, batch(model))
    assert len(pairs) == 5
    for pair in pairs:
        torch.testing.assert_close(pair.student, pair.teacher)
    assert not any(module.training for module in teacher.modules())


def test_both_corner_heatmaps_of_both_stacks_count():
    sizes = ((128, 128), (128, 128))
    model = build_pair(CORNERNET, distill=dense(), sizes=sizes)
    _, pairs = step(model, batch(model, sizes))
    assert [p.student.shape for p in pairs] == [(2, 80, 32, 32)] * 4
    assert model.distill['dist'].loss.activation == 'sigmoid'


def test_the_rpn_of_a_two_stage_detector():
    """It has no classes, so none are matched; a row holds the anchors of a location."""
    distill = dense(student='rpn_head', loss=EXACT)
    model = build_pair(FASTER, distill=distill)
    model.teacher.classes = match_classes(['b', 'a'], ['a', 'b'])
    check(model, batch(model), expit, strides=(4, 8, 16, 32, 64), head='rpn_head')


def test_rpns_of_two_detectors_under_different_names():
    rpn = 'rpn/rpn_r50_fpn_1x_coco.py'
    distill = dense(student='bbox_head', teacher='rpn_head')
    model = build_pair(rpn, FASTER, distill)
    assert model(**batch(model), mode='loss')['loss_dist'] > 0


def edit_classes(ours: int, theirs: int):
    """An edit that sets the numbers of classes; the student is the one of factor 8."""

    def edit(cfg, original, factor):
        cfg.bbox_head.num_classes = ours if factor == 8 else theirs

    return edit


def test_classes_are_matched_by_name():
    def edit(cfg, original, factor):
        first_levels(cfg)
        edit_classes(2, 3)(cfg, original, factor)

    model = build_pair(RETINANET, distill=dense(loss=EXACT), edit=edit)
    model.teacher.classes = match_classes(['cat', 'ant'], ['ant', 'bee', 'cat'])
    check(
        model,
        batch(model, num_classes=2),
        expit,
        lambda x: expit(x.reshape(-1, 9, 3)[:, :, [2, 0]].reshape(-1, 18)),
        STRIDES[:3],
    )


def of_student(change):
    """An edit of the student only."""
    return lambda cfg, *args: change(cfg) if args[-1] == 8 else None


def edit_anchors(**changes):
    """An edit of the anchors in the student's head or RPN."""

    def change(cfg):
        head = cfg.rpn_head if 'rpn_head' in cfg else cfg.bbox_head
        head.setdefault('anchor_generator', {}).update(changes)

    return of_student(change)


def square_anchors(cfg):
    cfg.bbox_head.square_anchor_generator.scales = [2]
    cfg.bbox_head.approx_anchor_generator.octave_base_scale = 2


FIRST = 'anchor 0 of level 0 is {} .* student, 45.3 x 22.6 .* teacher'


@pytest.mark.parametrize(
    'path, edit, message',
    [
        # the first three have as many anchors as the teacher
        (RETINANET, edit_anchors(ratios=[2.0, 1.0, 0.5]), FIRST.format('22.6 x 45.3')),
        (RETINANET, edit_anchors(octave_base_scale=8), FIRST.format('90.5 x 45.3')),
        (FASTER, edit_anchors(scales=[4]), FIRST.format('22.6 x 11.3')),
        (
            RETINANET,
            edit_anchors(scales_per_octave=2),
            r'the student has \[6, 6, .*, th',
        ),
        (
            FCOS,
            of_student(lambda cfg: cfg.bbox_head.update(strides=[4, 8, 16, 32, 64])),
            r'the strides of the student are \[\(4, .* teacher \[\(8, ',
        ),
        (
            RETINANET,
            of_student(first_levels),
            r'the student are \[\(8, 8\), \(16, 16\), \(32, 32\)\], ',
        ),
        (SABL, of_student(square_anchors), 'anchor 0 of level 0 is 16.0 x 16.0 '),
    ],
    ids=['ratios', 'scale', 'RPN', 'number', 'strides', 'levels', 'squares'],
)
def test_other_anchors_are_an_error(path, edit, message):
    distill = dense(student='rpn_head') if path == FASTER else dense()
    with pytest.raises(
        ValueError, match=f'{message}.*Use a teacher with the same levels, strides'
    ):
        build_pair(path, distill=distill, edit=edit)


@pytest.mark.parametrize(
    'path, edit, ours, theirs',
    [
        # as in mmdet's ATSS with Swin-L
        (ATSS, edit_anchors(center_offset=0.5), '0.5', '0.0'),
        (RTMDET, edit_anchors(offset=0.5), '0.5', '0.0'),
        ((ATSS, FCOS), None, '0.0', '0.5'),
    ],
)
def test_the_same_anchors_elsewhere_in_a_location_are_a_warning(
    path, edit, ours, theirs
):
    pair = path if isinstance(path, tuple) else (path, path)
    message = rf'\[{ours}, {ours}\] strides .* the student, \[{theirs}, {theirs}\] for'
    with pytest.warns(UserWarning, match=message):
        model = build_pair(*pair, dense(), edit=edit)
    assert model(**batch(model), mode='loss')['loss_dist'] > 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        build_pair(pair[0], distill=dense())
    assert not any('strides' in str(w.message) for w in caught)


def test_maps_of_another_size_are_an_error():
    """The strides that a head states need not be those of its backbone."""
    edit = of_student(lambda cfg: cfg.backbone.update(strides=(1, 2, 2, 1)))
    model = build_pair(RETINANET, distill=dense(), edit=edit)
    with pytest.raises(
        ValueError,
        match=r'student has \[\(9, 8, 8\), .*Use a teacher with the same levels, strid',
    ):
        model(**batch(model), mode='loss')


def test_other_classes_of_unknown_names_are_an_error_about_classes():
    model = build_pair(RETINANET, distill=dense(), edit=edit_classes(3, 5))
    with pytest.raises(ValueError, match=r'\(2, 27, .*\(2, 45, .*classes differ') as e:
        model(**batch(model), mode='loss')
    assert 'strides' not in str(e.value)


def test_levels_of_different_numbers_of_anchors_are_not_concatenated():
    from mmdist import Pair
    from mmdist.comparisons.dense_logits import _concatenate

    pairs = [Pair(x, x) for x in (torch.rand(1, 8, 2, 2), torch.rand(1, 12, 1, 1))]
    with pytest.raises(ValueError, match="anchors='separate', or levels='sum'"):
        _concatenate(pairs)


# ---- score='joint' ---------------------------------------------------------------


def all_of_them(head: nn.Module) -> ConfigDict:
    """A test_cfg with which a head predicts at all locations, whatever the score."""
    many = 10**6
    return ConfigDict(
        head.test_cfg,
        score_thr=-1,
        conf_thr=-1,
        nms_pre=many,
        min_bbox_size=-1,
        nms=dict(type='nms', iou_threshold=1.0),
        max_per_img=many,
    )


@pytest.mark.parametrize(
    'path',
    [
        RETINANET,
        FCOS,
        YOLOX,
        YOLOV3,
        RTMDET,
        TOOD,
        ATSS,
        SABL,
        'autoassign/autoassign_r50-caffe_fpn_1x_coco.py',
        'centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py',
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        'ddod/ddod_r50_fpn_1x_coco.py',
        'foveabox/fovea_r50_fpn_4xb4-1x_coco.py',
        GFL,
        *slow(['lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py']),
        *slow(['nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py']),
        PAA,
        VFNET,
        YOLOF,
    ],
    ids=lambda path: path.split('/')[0],
)
def test_joint_scores_are_those_that_the_head_predicts_by(path):
    """Oracle: all scores that the head itself passes to NMS, on random maps."""
    register_all_modules()
    torch.manual_seed(0)
    cfg = model_config(path)
    head = MODELS.build(
        dict(cfg.bbox_head, num_classes=4, test_cfg=cfg.test_cfg)
    ).eval()
    generator = getattr(head, 'prior_generator', None) or head.square_anchor_generator
    channels = head.in_channels
    if isinstance(channels, int):
        channels = [channels] * generator.num_levels
    with torch.no_grad():
        output = head(tuple(torch.randn(1, c, 6, 4) for c in channels))
    output = tree_map(lambda x: 2 * torch.randn_like(x), output)
    if path == TOOD:
        output = ([x.sigmoid() for x in output[0]], output[1])

    meta = dict(img_shape=(96, 128), scale_factor=(1, 1))
    (result,) = head.predict_by_feat(
        *output, batch_img_metas=[meta], cfg=all_of_them(head)
    )
    scores = family.scores_of(head, output, 'joint')
    assert all(level.shape[2:] == (4, 6, 4) for level in scores)
    scores = torch.cat([as_matrix(level.flatten(0, 1)) for level in scores])
    if path == YOLOX:  # it keeps only the best class of a location
        scores[scores < scores.max(1, keepdim=True).values] = -1
    for label, column in enumerate(scores.T):
        theirs = result.scores[result.labels == label].sort().values
        torch.testing.assert_close(column[column >= 0].sort().values, theirs)
        assert len(theirs) > 1


@pytest.mark.parametrize(
    'student, teacher, score',
    [
        (ATSS, TOOD, 'class'),  # logits <- probabilities
        (ATSS, TOOD, 'joint'),
        (YOLOX, RTMDET, 'joint'),  # trained on objects only <- quality
        *slow([(FCOS, GFL, 'joint'), (VFNET, ATSS, 'joint')]),  # points <- anchors, ...
    ],
)
def test_scores_of_heads_of_other_meaning_are_probabilities(student, teacher, score):
    model = build_pair(student, teacher, dense(score=score))
    data, guest = batch(model), model.teacher
    losses, pairs = step(model, data)
    default = model.distill['dist'].loss.activation
    assert {pair.activation or default for pair in pairs} == {'identity'}
    for path, name, side, images in (
        (student, 'student', model, data['inputs']),
        (teacher, 'teacher', guest.model, guest.renormalize(data['inputs'], SIZES)),
    ):
        with torch.no_grad():
            output = side.bbox_head(side.extract_feat(images))
        assert len(pairs) == len(output[0])
        for level, pair in enumerate(pairs):
            scores = output[0][level].double().numpy()
            if path != TOOD:
                scores = expit(scores)
            if score == 'joint' and path in (YOLOX, FCOS, ATSS):
                scores = scores * expit(output[2][level].double().numpy())
            found = getattr(pair, name).detach()
            np.testing.assert_allclose(found, scores, atol=1e-6)

    losses['loss_dist'].backward()
    assert_learns(model.backbone, least=1e-4)
    if score == 'joint' and student == ATSS:
        assert_learns(model.bbox_head.atss_centerness)


def test_the_root_of_a_vanishing_score_has_a_finite_gradient():
    """PAA's score is the root of a probability, which is 0 in fp32."""
    register_all_modules()
    head = MODELS.build(model_config(PAA).bbox_head)
    output = [torch.full((1, c, 2, 2), -200.0) for c in (80, 4, 1)]
    output[0].requires_grad_()
    (scores,) = family.scores_of(head, tuple([x] for x in output), 'joint')
    scores.sum().backward()
    assert output[0].grad.isfinite().all()


def two_and_three_classes(**options):
    """Per level, the pair and the raw outputs of YOLACTs with two and three classes."""
    sizes = ((64, 64), (64, 64))
    edit = edit_classes(2, 3)
    model = build_pair(YOLACT, distill=dense(**options), edit=edit, sizes=sizes)
    model.teacher.classes = match_classes(['cat', 'ant'], ['ant', 'bee', 'cat'])
    data = batch(model, sizes, num_classes=2)
    _, pairs = step(model, data)
    return zip(pairs, raw_outputs(model, data), strict=True)


def test_joint_scores_of_other_classes_are_matched_by_name():
    """For softmax heads; their background is not compared."""
    for pair, raw in two_and_three_classes(score='joint'):
        sides = (pair.student, 3, [0, 1]), (pair.teacher, 4, [2, 0])
        for (actual, number, columns), x in zip(sides, raw, strict=True):
            expected = softmax(as_rows(x).reshape(-1, number), axis=1)[:, columns]
            actual = as_rows(actual.detach().numpy()).reshape(-1, 2)
            np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('anchors', ['joint', 'separate'])
def test_a_class_that_the_student_does_not_know_is_background(anchors):
    """For a softmax head. Oracle: sums of probabilities."""
    for pair, (_, teacher) in two_and_three_classes(anchors=anchors):
        ant, bee, cat, background = softmax(as_rows(teacher).reshape(-1, 4), axis=1).T
        expected = np.stack([cat, ant, background + bee], 1)
        actual = pair.teacher.double()
        if anchors == 'separate':
            actual = actual.movedim(2, -1)
        actual = as_matrix(actual).numpy().reshape(-1, 3)
        np.testing.assert_allclose(softmax(actual, axis=1), expected, rtol=1e-4)


@pytest.mark.parametrize(
    'path, student, message',
    [
        (FASTER, None, 'cannot compare a FasterRCNN: it has no `bbox_head` or'),
        (RETINANET, 'rpn_head', 'cannot compare a RetinaNet: .*it has no `rpn_head`'),
        (CASCADE_RPN, 'rpn_head', 'a CascadeRPNHead, whose stages need the anchors'),
        (FASTER, 'neck', 'cannot compare a FasterRCNN: .*is a FPN, which does not'),
    ],
)
def test_what_is_not_a_dense_head_is_refused_by_name(path, student, message):
    with pytest.raises(ValueError, match=f'{message}.*docs/own_comparison.md'):
        build_pair(path, distill=dense(student=student))

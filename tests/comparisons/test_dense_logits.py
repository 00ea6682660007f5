from __future__ import annotations

import numpy as np
import pytest
import torch
from det_zoo import batch, build_pair
from scipy.special import expit, softmax
from scipy.stats import pearsonr
from test_det_zoo import keep_backbone
from torch import nn

from mmdist.teachers.teacher import match_classes

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
YOLACT = 'yolact/yolact_r50_1xb8-55e_coco.py'
YOLOV3 = 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'
TOOD = 'tood/tood_r50_fpn_1x_coco.py'
ATSS = 'atss/atss_r50_fpn_1x_coco.py'
SOLO = 'solo/solo_r50_fpn_1x_coco.py'
GUIDED = 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py'
CORNERNET = 'cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py'
CASCADE_RPN = 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'
PADDED = ((64, 64), (48, 40))
EXACT = dict(type='mmdist.DISTLoss', eps=0)


def dense(**kwargs) -> dict:
    return dict(dist=dict(type='mmdist.DenseLogits', **kwargs))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where there is none, with one entry or all the same."""
    if len(a) < 2 or any(np.linalg.norm(x - x.mean()) < 1e-6 for x in (a, b)):
        return 0.0
    return pearsonr(a, b)[0]


def dist(student: np.ndarray, teacher: np.ndarray) -> float:
    """The published loss, term by term."""
    inter = [correlation(s, t) for s, t in zip(student, teacher, strict=True)]
    intra = [correlation(s, t) for s, t in zip(student.T, teacher.T, strict=True)]
    return (1 - np.mean(inter)) + (1 - np.mean(intra)) if inter else 0.0


def raw_outputs(model: nn.Module, data: dict) -> tuple[list, list]:
    """What the two heads return for the batch, by the models' own forward."""
    with torch.no_grad():
        return tuple(
            [
                level.double().numpy()
                for level in side.bbox_head(side.extract_feat(data['inputs']))[0]
            ]
            for side in (model, model.teacher.model)
        )


def valid_rows(shape: tuple[int, int], stride: float, sizes=PADDED) -> np.ndarray:
    """Locations whose centre lies in the image, image after image."""
    y = (np.arange(shape[0]) + 0.5) * stride
    x = (np.arange(shape[1]) + 0.5) * stride
    return np.stack([(y < h)[:, None] & (x < w) for h, w in sizes])


def as_rows(level: np.ndarray, anchors: int, joint: bool) -> np.ndarray:
    """Rows of (image, y, x), or of (image, y, x, anchor)."""
    n, channels, h, w = level.shape
    rows = level.transpose(0, 2, 3, 1).reshape(n * h * w, channels)
    return rows if joint else rows.reshape(n * h * w * anchors, channels // anchors)


def keep_pairs(model: nn.Module) -> list:
    """The pairs that the comparison will make."""
    comparison, pairs = model.distill['dist'], []
    pair = comparison.pair
    comparison.pair = lambda *args: pairs.extend(pair(*args)) or pairs
    return pairs


@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('levels', ['sum', 'concat'])
@pytest.mark.parametrize('anchors', ['joint', 'separate'])
def test_rows_of_retinanet_against_numpy(anchors, levels, mask):
    distill = dense(anchors=anchors, levels=levels, ignore_mask=mask, loss=EXACT)
    model = build_pair(RETINANET, distill=distill, edit=first_levels, sizes=PADDED)
    data = batch(model, PADDED)
    losses = model(**data, mode='loss')

    rows = []
    for student, teacher, stride in zip(
        *raw_outputs(model, data), (8, 16, 32), strict=True
    ):
        assert student.shape[1] == 9 * 80
        counts = valid_rows(student.shape[-2:], stride).ravel()
        counts = counts if mask else np.ones_like(counts)
        joint = anchors == 'joint'
        counts = counts if joint else counts.repeat(9)
        rows.append([expit(as_rows(x, 9, joint))[counts] for x in (student, teacher)])
    if levels == 'concat':
        rows = [[np.concatenate(side) for side in zip(*rows, strict=True)]]
    expected = sum(dist(student, teacher) for student, teacher in rows)
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


def first_levels(cfg, original, factor):
    """Three of five levels: the last ones have one location of such small images."""
    cfg.neck.num_outs = 3
    cfg.neck.add_extra_convs = False
    cfg.bbox_head.anchor_generator.strides = [8, 16, 32]


def test_a_copy_of_the_student_follows_it_perfectly():
    model = build_pair(
        RETINANET, distill=dense(loss=EXACT), factors=(8, 8), edit=first_levels
    )
    model.teacher.model.load_state_dict(model.state_dict())
    losses = model(**batch(model), mode='loss')
    assert losses['dist_inter'].item() == pytest.approx(1, abs=1e-5)
    assert losses['dist_intra'].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('anchors', ['joint', 'separate'])
def test_softmax_is_over_the_classes_of_one_anchor(anchors):
    """YOLACT has 3 anchors of 80 classes and a background."""
    sizes = ((64, 64), (64, 64))
    model = build_pair(YOLACT, distill=dense(anchors=anchors, loss=EXACT), sizes=sizes)
    data = batch(model, sizes)
    losses = model(**data, mode='loss')
    expected = 0
    for student, teacher in zip(*raw_outputs(model, data), strict=True):
        rows = [softmax(as_rows(x, 3, joint=False), axis=1) for x in (student, teacher)]
        if anchors == 'joint':
            rows = [x.reshape(-1, 3 * 81) for x in rows]
        expected += dist(*rows)
    # Of two rows, those of the last level, rounding may decide between 1 and -1.
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-2)


def test_yolov3_is_split_into_box_objectness_and_classes():
    model = build_pair(
        YOLOV3,
        distill=dense(anchors='separate', loss=EXACT),
        edit=keep_backbone,
        sizes=((96, 96), (96, 96)),
    )
    data = batch(model, ((96, 96), (96, 96)))
    losses = model(**data, mode='loss')
    expected = 0
    for student, teacher in zip(*raw_outputs(model, data), strict=True):
        rows = [as_rows(x, 3, joint=False) for x in (student, teacher)]
        assert rows[0].shape[1] == 4 + 1 + 80
        expected += dist(*(expit(x[:, 5:]) for x in rows))
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


def test_heads_that_return_probabilities_are_not_squashed_again():
    model = build_pair(TOOD, distill=dense(loss=EXACT))
    assert model.distill['dist'].loss.activation == 'identity'
    data = batch(model)
    losses = model(**data, mode='loss')
    expected = 0
    # The last level has one location, not the half of one.
    for student, teacher, stride in zip(
        *raw_outputs(model, data), (8, 16, 32, 64, 64), strict=True
    ):
        assert teacher.min() >= 0 and teacher.max() <= 1
        counts = valid_rows(student.shape[-2:], stride, ((64, 64), (48, 64))).ravel()
        expected += dist(
            *(as_rows(x, 1, joint=True)[counts] for x in (student, teacher))
        )
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('path', [SOLO, GUIDED], ids=['SOLO', 'GA-RetinaNet'])
def test_heads_that_filter_in_eval_are_asked_as_in_training(path):
    """SOLO suppresses neighbours, guided anchoring skips locations (one image only)."""
    model = build_pair(path, distill=dense(), factors=(8, 8))
    teacher = model.teacher.model
    teacher.load_state_dict(model.state_dict())
    pairs = keep_pairs(model)
    model(**batch(model), mode='loss')
    assert len(pairs) == 5
    for pair in pairs:
        torch.testing.assert_close(pair.student, pair.teacher)
    assert not any(module.training for module in teacher.modules())


def test_both_corner_heatmaps_of_both_stacks_count():
    sizes = ((128, 128), (128, 128))
    model = build_pair(CORNERNET, distill=dense(), sizes=sizes)
    pairs = keep_pairs(model)
    model(**batch(model, sizes), mode='loss')
    assert [p.student.shape for p in pairs] == [(2, 80, 32, 32)] * 4
    assert model.distill['dist'].loss.activation == 'sigmoid'


def test_the_rpn_of_a_two_stage_detector():
    """It knows no classes, so none are matched; a row is the anchors of a location."""
    distill = dense(student='rpn_head', loss=EXACT)
    model = build_pair(FASTER, distill=distill)
    model.class_match = match_classes(['b', 'a'], ['a', 'b'])
    data = batch(model)
    losses = model(**data, mode='loss')
    with torch.no_grad():
        levels = [
            side.rpn_head(side.extract_feat(data['inputs']))[0]
            for side in (model, model.teacher.model)
        ]
    expected = 0
    for *both, stride in zip(*levels, (4, 8, 16, 32, 64), strict=True):
        counts = valid_rows(both[0].shape[-2:], stride, ((64, 64), (48, 64))).ravel()
        rows = [expit(as_rows(x.double().numpy(), 3, joint=True))[counts] for x in both]
        expected += dist(*rows)
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


def test_rpns_of_two_detectors_under_different_names():
    rpn = 'rpn/rpn_r50_fpn_1x_coco.py'
    distill = dense(student='bbox_head', teacher='rpn_head')
    model = build_pair(rpn, FASTER, distill)
    assert model(**batch(model), mode='loss')['loss_dist'] > 0


def test_classes_are_matched_by_name():
    def classes(number):
        def edit(cfg, original, factor):
            first_levels(cfg, original, factor)
            # the student is the one of 1/8 of the channels
            cfg.bbox_head.num_classes = 2 if factor == 8 else number

        return edit

    model = build_pair(RETINANET, distill=dense(loss=EXACT), edit=classes(3))
    model.class_match = match_classes(['cat', 'ant'], ['ant', 'bee', 'cat'])
    data = batch(model, num_classes=2)
    losses = model(**data, mode='loss')
    expected = 0
    for student, teacher, stride in zip(
        *raw_outputs(model, data), (8, 16, 32), strict=True
    ):
        counts = valid_rows(student.shape[-2:], stride, ((64, 64), (48, 64))).ravel()
        teacher = as_rows(teacher, 9, joint=True).reshape(-1, 9, 3)
        teacher = teacher[:, :, [2, 0]].reshape(-1, 18)
        expected += dist(
            expit(as_rows(student, 9, joint=True)[counts]), expit(teacher[counts])
        )
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    'edit',
    ['anchors', 'strides', 'levels'],
)
def test_other_anchors_or_strides_or_levels_are_an_error(edit):
    def differ(cfg, original, factor):
        if factor == 8:
            return
        if edit == 'anchors':
            cfg.bbox_head.anchor_generator.octave_base_scale = 4
            cfg.bbox_head.anchor_generator.scales_per_octave = 2
        elif edit == 'strides':
            cfg.backbone.strides = (1, 2, 2, 1)
            cfg.bbox_head.anchor_generator.strides = [8, 16, 16, 32, 64]
        else:
            first_levels(cfg, original, factor)

    model = build_pair(RETINANET, distill=dense(), edit=differ)
    with pytest.raises(
        ValueError, match='Take a teacher with the same levels, strides'
    ):
        model(**batch(model), mode='loss')


def test_levels_of_different_numbers_of_anchors_are_not_concatenated():
    from mmdist import Pair
    from mmdist.comparisons.dense_logits import _concatenate

    pairs = [Pair(x, x) for x in (torch.rand(1, 8, 2, 2), torch.rand(1, 12, 1, 1))]
    with pytest.raises(ValueError, match="anchors='separate', or levels='sum'"):
        _concatenate(pairs)


def test_scores_of_different_kinds_are_an_error():
    with pytest.raises(ValueError, match=r'ATSSHead gives.*sigmoid.*TOODHead for iden'):
        build_pair(ATSS, TOOD, dense())


@pytest.mark.parametrize(
    'path, student, message',
    [
        (FASTER, None, 'cannot compare a FasterRCNN: it has no `bbox_head` or'),
        (RETINANET, 'rpn_head', 'cannot compare a RetinaNet: .*it has no `rpn_head`'),
        (CASCADE_RPN, 'rpn_head', 'a CascadeRPNHead, whose stages need the anchors'),
        (FASTER, 'neck', 'cannot compare a FasterRCNN: .*which FPN does not have'),
    ],
)
def test_what_is_not_a_dense_head_is_refused_by_name(path, student, message):
    with pytest.raises(ValueError, match=f'{message}.*docs/own_comparison.md'):
        build_pair(path, distill=dense(student=student))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(anchors='all'), "`anchors` is 'joint' or 'separate'"),
        (dict(levels='mean'), "`levels` is 'sum' or 'concat'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pair(RETINANET, distill=dense(**arguments))

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from common import dist, slow, step
from det_zoo import SIZES, batch, build_pair, keep_backbone, model_config
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from scipy.special import expit, softmax
from torch import nn
from torch.utils._pytree import tree_map

from mmdist.families import dense as family
from mmdist.losses import as_rows as as_matrix
from mmdist.registry import MODELS
from mmdist.teachers import match_classes

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
YOLOF = 'yolof/yolof_r50-c5_8xb8-1x_coco.py'
YOLACT = 'yolact/yolact_r50_1xb8-55e_coco.py'
YOLOV3 = 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'
TOOD = 'tood/tood_r50_fpn_1x_coco.py'
ATSS = 'atss/atss_r50_fpn_1x_coco.py'
GFL = 'gfl/gfl_r50_fpn_1x_coco.py'
PAA = 'paa/paa_r50_fpn_1x_coco.py'
RTMDET = 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
SABL = 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'
VFNET = 'vfnet/vfnet_r50_fpn_1x_coco.py'
YOLOX = 'yolox/yolox_tiny_8xb8-300e_coco.py'
SOLO = 'solo/solo_r50_fpn_1x_coco.py'
GUIDED = 'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py'
CORNERNET = 'cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py'
CASCADE_RPN = 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'
PADDED = ((64, 64), (48, 40))
EXACT = dict(type='mmdist.DISTLoss', eps=0)


def dense(**kwargs) -> dict:
    return dict(dist=dict(type='mmdist.DenseLogits', **kwargs))


def raw_outputs(model: nn.Module, data: dict) -> tuple[list, list]:
    """What the two heads return for the batch, by the models' own forward."""
    sizes = [sample.img_shape for sample in data['data_samples']]
    inputs = data['inputs'], model.teacher.renormalize(data['inputs'], sizes)
    with torch.no_grad():
        return tuple(
            [
                level.double().numpy()
                for level in side.bbox_head(side.extract_feat(images))[0]
            ]
            for side, images in zip((model, model.teacher.model), inputs, strict=True)
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
    """It knows no classes, so none are matched; a row is the anchors of a location."""
    distill = dense(student='rpn_head', loss=EXACT)
    model = build_pair(FASTER, distill=distill)
    model.teacher.classes = match_classes(['b', 'a'], ['a', 'b'])
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
    model.teacher.classes = match_classes(['cat', 'ant'], ['ant', 'bee', 'cat'])
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


def edit_anchors(**changes):
    """An edit of the anchors of the student's head, or of its RPN."""

    def edit(cfg, original, factor):
        if factor == 8:
            head = cfg.rpn_head if 'rpn_head' in cfg else cfg.bbox_head
            head.setdefault('anchor_generator', {}).update(changes)

    return edit


def edit_strides(cfg, original, factor):
    if factor == 8:
        cfg.bbox_head.strides = [4, 8, 16, 32, 64]


def edit_square_anchors(cfg, original, factor):
    if factor == 8:
        cfg.bbox_head.square_anchor_generator.scales = [2]
        cfg.bbox_head.approx_anchor_generator.octave_base_scale = 2


def fewer_levels(cfg, original, factor):
    if factor == 8:
        first_levels(cfg, original, factor)


@pytest.mark.parametrize(
    'path, edit, message',
    [
        (
            RETINANET,
            edit_anchors(ratios=[2.0, 1.0, 0.5]),  # as many
            'anchor 0 of level 0 is 22.6 x 45.3 .* student, 45.3 x 22.6 .* teacher',
        ),
        (
            RETINANET,
            edit_anchors(octave_base_scale=8),  # as many
            'anchor 0 of level 0 is 90.5 x 45.3 .* student, 45.3 x 22.6 .* teacher',
        ),
        (
            FASTER,
            edit_anchors(scales=[4]),  # as many
            'anchor 0 of level 0 is 22.6 x 11.3 .* student, 45.3 x 22.6 .* teacher',
        ),
        (
            RETINANET,
            edit_anchors(scales_per_octave=2),
            r'the student has \[6, 6, .* anchors .*, the teacher \[9, 9, ',
        ),
        (
            FCOS,
            edit_strides,
            r'the strides of the student are \[\(4, 4\), .* teacher \[\(8, 8\), ',
        ),
        (
            RETINANET,
            fewer_levels,
            r'strides of the student are \[\(8, 8\), \(16, 16\), \(32, 32\)\], ',
        ),
        (SABL, edit_square_anchors, 'anchor 0 of level 0 is 16.0 x 16.0 '),
    ],
    ids=['ratios', 'scale', 'RPN', 'number', 'strides', 'levels', 'squares'],
)
def test_other_anchors_are_an_error(path, edit, message):
    """Also where there are equally many of them."""
    distill = dense(student='rpn_head') if path == FASTER else dense()
    with pytest.raises(
        ValueError, match=f'{message}.*Take a teacher with the same levels, strides'
    ):
        build_pair(path, distill=distill, edit=edit)


@pytest.mark.parametrize(
    'path, edit, ours, theirs',
    [
        # as mmdet's ATSS with a Swin-L has it
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
    """What a head says of its strides is not what its backbone does."""

    def differ(cfg, original, factor):
        if factor == 8:
            cfg.backbone.strides = (1, 2, 2, 1)

    model = build_pair(RETINANET, distill=dense(), edit=differ)
    with pytest.raises(
        ValueError,
        match=r'student has \[\(9, 8, 8\), .*Take a teacher with the same levels, stri',
    ):
        model(**batch(model), mode='loss')


def test_other_classes_of_unknown_names_are_an_error_about_classes():
    def classes(cfg, original, factor):
        cfg.bbox_head.num_classes = {8: 3, 4: 5}[factor]

    model = build_pair(RETINANET, distill=dense(), edit=classes)
    with pytest.raises(
        ValueError, match=r'\(2, 27, .*\(2, 45, .*have other classes'
    ) as e:
        model(**batch(model), mode='loss')
    assert 'strides' not in str(e.value)


def test_levels_of_different_numbers_of_anchors_are_not_concatenated():
    from mmdist import Pair
    from mmdist.comparisons.dense_logits import _concatenate

    pairs = [Pair(x, x) for x in (torch.rand(1, 8, 2, 2), torch.rand(1, 12, 1, 1))]
    with pytest.raises(ValueError, match="anchors='separate', or levels='sum'"):
        _concatenate(pairs)


def test_scores_of_different_kinds_are_compared_as_probabilities():
    """ATSS has sigmoids, TOOD returns probabilities."""
    model = build_pair(ATSS, TOOD, dense())
    data = batch(model)
    losses, pairs = step(model, data)
    assert losses['loss_dist'].item() > 0
    for pair, student, teacher in zip(pairs, *raw_outputs(model, data), strict=True):
        assert pair.activation == 'identity'
        np.testing.assert_allclose(pair.student.detach(), expit(student), atol=1e-6)
        np.testing.assert_allclose(pair.teacher, teacher, atol=1e-6)


# ---- score='joint' ---------------------------------------------------------------


def all_of_them(head: nn.Module) -> ConfigDict:
    """A test_cfg by which a head predicts at all locations, whatever the score."""
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
    """Of random maps, all scores that the head itself would hand to NMS."""
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
    if path == YOLOX:  # it keeps the best class of a location
        scores[scores < scores.max(1, keepdim=True).values] = -1
    for label, column in enumerate(scores.T):
        theirs = result.scores[result.labels == label].sort().values
        torch.testing.assert_close(column[column >= 0].sort().values, theirs)
        assert len(theirs) > 1


@pytest.mark.parametrize(
    'student, teacher',
    [
        (YOLOX, RTMDET),  # trained at objects alone <- quality
        (ATSS, TOOD),  # logits <- probabilities
        *slow([(FCOS, GFL), (VFNET, ATSS)]),  # points <- anchors, ...
    ],
)
def test_joint_scores_of_heads_of_other_meaning(student, teacher):
    model = build_pair(student, teacher, dense(score='joint'))
    assert model.distill['dist'].loss.activation == 'identity'
    data = batch(model)
    losses, pairs = step(model, data)
    guest = model.teacher
    inputs = guest.renormalize(data['inputs'], SIZES)
    with torch.no_grad():
        outputs = (
            model.bbox_head(model.extract_feat(data['inputs'])),
            guest.model.bbox_head(guest.model.extract_feat(inputs)),
        )
    assert len(pairs) == len(outputs[0][0])
    for level, pair in enumerate(pairs):
        for path, output, actual in zip(
            (student, teacher), outputs, (pair.student, pair.teacher), strict=True
        ):
            scores = output[0][level].double().numpy()
            if path != TOOD:
                scores = expit(scores)
            if path in (YOLOX, FCOS, ATSS):
                scores = scores * expit(output[2][level].double().numpy())
            np.testing.assert_allclose(actual.detach().numpy(), scores, atol=1e-6)

    losses['loss_dist'].backward()
    norms = [p.grad.norm() for p in model.backbone.parameters() if p.grad is not None]
    assert torch.stack(norms).isfinite().all()
    assert torch.stack(norms).norm() > 1e-4


def test_the_second_score_learns_too():
    model = build_pair(ATSS, distill=dense(score='joint'))
    model(**batch(model), mode='loss')['loss_dist'].backward()
    assert model.bbox_head.atss_centerness.weight.grad.norm() > 0


def test_the_root_of_a_vanishing_score_has_a_finite_gradient():
    """Of PAA: the probability itself is 0 in fp32."""
    register_all_modules()
    head = MODELS.build(model_config(PAA).bbox_head)
    output = [torch.full((1, c, 2, 2), -200.0) for c in (80, 4, 1)]
    output[0].requires_grad_()
    (scores,) = family.scores_of(head, tuple([x] for x in output), 'joint')
    scores.sum().backward()
    assert output[0].grad.isfinite().all()


def pairs_of_two_and_three_classes(distill: dict) -> tuple[nn.Module, dict, list]:
    """A YOLACT of two classes and one of three, by softmax, its batch and pairs."""

    def classes(cfg, original, factor):
        cfg.bbox_head.num_classes = 2 if factor == 8 else 3

    sizes = ((64, 64), (64, 64))
    model = build_pair(YOLACT, distill=distill, edit=classes, sizes=sizes)
    model.teacher.classes = match_classes(['cat', 'ant'], ['ant', 'bee', 'cat'])
    data = batch(model, sizes, num_classes=2)
    _, pairs = step(model, data)
    return model, data, pairs


def test_joint_scores_of_other_classes_are_matched_by_name():
    """Of softmax heads; their background is not compared."""
    model, data, pairs = pairs_of_two_and_three_classes(dense(score='joint'))
    for pair, student, teacher in zip(pairs, *raw_outputs(model, data), strict=True):
        for actual, raw, columns in (
            (pair.student, student, [0, 1]),
            (pair.teacher, teacher, [2, 0]),
        ):
            expected = softmax(as_rows(raw, 3, joint=False), axis=1)[:, columns]
            actual = as_rows(actual.detach().numpy(), 3, joint=False)
            np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('anchors', ['joint', 'separate'])
def test_a_class_that_the_student_does_not_know_is_background(anchors):
    """Of a softmax head, against sums of probabilities."""
    model, data, pairs = pairs_of_two_and_three_classes(dense(anchors=anchors))
    for pair, teacher in zip(pairs, raw_outputs(model, data)[1], strict=True):
        ant, bee, cat, background = softmax(as_rows(teacher, 3, False), axis=1).T
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

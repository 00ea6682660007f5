"""What two detectors say of the same boxes, whatever their architectures."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from det_zoo import FAMILIES, batch, build_pair, keep_transformer
from mmdet.structures.bbox import bbox2roi
from mmengine.logging import MMLogger
from scipy.special import expit, rel_entr, softmax
from torch import nn

from mmdist.comparisons.box_logits import WARN_AFTER, largest_overlap
from mmdist.comparisons.decode import decode_boxes
from mmdist.comparisons.dense_logits import activation_of
from mmdist.record import Recorder

RETINANET, ATSS, FASTER, CASCADE = (
    FAMILIES[name] for name in ('RetinaNet', 'ATSS', 'Faster R-CNN', 'Cascade R-CNN')
)
ANY_SIZE = (
    'RetinaNet',
    'FCOS',
    'ATSS',
    'RTMDet',
    'YOLOX',
    'TOOD',
    'Faster R-CNN',
    'Cascade R-CNN',
    'DINO',
    'Deformable DETR',
    'Sparse R-CNN',
)  # and SSD
SIZES = ((96, 96), (72, 96))


def for_its_family(cfg, original, factor):
    if original.type == 'DINO':
        keep_transformer(cfg, original, factor)


def boxes(**kwargs) -> dict:
    return dict(dist=dict(type='mmdist.BoxLogits', **kwargs))


def pair(student: str, teacher: str, distill: dict | None) -> nn.Module:
    return build_pair(student, teacher, distill, edit=for_its_family, sizes=SIZES)


def copy_teacher(path: str, distill: dict) -> nn.Module:
    """A student and a teacher of the same weights, both in eval."""
    model = build_pair(path, path, distill, (8, 8), for_its_family, SIZES)
    model.teacher.model.load_state_dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model.eval()


def step(model: nn.Module) -> tuple[dict, list, dict]:
    """The losses, the pairs and the batch of one loss pass."""
    data = batch(model, SIZES)
    comparison = model.distill['dist']
    with Recorder([comparison]) as recorder:
        losses = model(**data, mode='loss')
    return losses, recorder.calls(comparison)[0].args[1], data


# ---- every detector teaches every detector ---------------------------------------


@pytest.mark.parametrize('teacher', ANY_SIZE)
@pytest.mark.parametrize('student', ANY_SIZE)
def test_every_detector_teaches_every_detector(student, teacher):
    model = pair(FAMILIES[student], FAMILIES[teacher], boxes(min_iou=0.0))
    losses, _, _ = step(model)
    keys = [k for k in losses if k.startswith('loss_dist')]
    assert len(keys) == (3 if student == 'Cascade R-CNN' else 1)
    total = sum(losses[k] for k in keys)
    assert 0 < total.item() < 10 and losses['dist_matched'] == 1
    total.backward()
    grads = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert any(grad.abs().max() > 0 for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('student', ['SSD', 'RetinaNet', 'Faster R-CNN'])
@pytest.mark.parametrize('teacher', ['SSD', 'Cascade R-CNN'])
def test_ssd(student, teacher):
    sizes = ((300, 300),)
    factors = tuple(1 if name == 'SSD' else 8 for name in (student, teacher))
    distill = boxes(min_iou=0.0)
    model = build_pair(
        FAMILIES[student], FAMILIES[teacher], distill, factors, sizes=sizes
    )
    losses = model(**batch(model, sizes), mode='loss')
    assert losses['loss_dist'] > 0
    losses['loss_dist'].backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()
    )


@pytest.mark.parametrize(
    ('student', 'teacher', 'kind'),
    [
        ('RetinaNet', 'RetinaNet', 'DenseLogits'),
        ('RetinaNet', 'FCOS', 'Detections'),
        ('RetinaNet', 'Cascade R-CNN', 'Detections'),
        ('Faster R-CNN', 'Cascade R-CNN', 'RoILogits'),
        ('Faster R-CNN', 'DINO', 'Detections'),
        ('Deformable DETR', 'DINO', 'QueryLogits'),
        ('DINO', 'TOOD', 'Detections'),
    ],
)
def test_the_pair_decides_what_is_compared_by_default(student, teacher, kind):
    model = pair(FAMILIES[student], FAMILIES[teacher], None)
    assert type(model.distill['dist']).__name__ == kind
    assert 'loss_dist' in step(model)[0]


def test_what_cannot_be_compared_is_refused_with_what_can():
    message = (
        r'(?s)DenseLogits cannot compare a FasterRCNN.*Detections cannot compare a '
        r'CenterNet.*how a CenterNetHead encodes its boxes is not known.*'
        r'mmdist\.Features'
    )
    with pytest.raises(ValueError, match=message):
        pair(FAMILIES['CenterNet'], FAMILIES['Faster R-CNN'], None)
    for kwargs in (dict(top_k=0), dict(min_iou=1.0)):
        with pytest.raises(ValueError, match=rf'`{next(iter(kwargs))}` is'):
            pair(RETINANET, CASCADE, boxes(**kwargs))


# ---- the boxes -------------------------------------------------------------------


@pytest.mark.parametrize(
    'path',
    [
        RETINANET,
        ATSS,
        FAMILIES['FCOS'],
        'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py',
        FAMILIES['RTMDet'],
        FAMILIES['TOOD'],
        'gfl/gfl_r50_fpn_1x_coco.py',
        'vfnet/vfnet_r50_fpn_1x_coco.py',
        'reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py',
        'centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py',
        'foveabox/fovea_r50_fpn_4xb4-1x_coco.py',
        'autoassign/autoassign_r50-caffe_fpn_1x_coco.py',
    ],
)
def test_boxes_are_those_that_the_head_predicts(path):
    """Its own, before NMS, with the class scores that go with them."""
    model = build_pair(path, sizes=SIZES)
    head, data = model.bbox_head, batch(model, SIZES)
    metas = [sample.metainfo for sample in data['data_samples']]
    with torch.no_grad():
        features = model.eval().extract_feat(data['inputs'])
        decoded = {}
        for training in (True, False):
            head.training = training
            output = head(features)
            decoded[training] = decode_boxes(head, output, activation_of(head), metas)
        cfg = head.test_cfg.copy()
        cfg.update(score_thr=0.0, nms_pre=20, min_bbox_size=-1)
        predicted = head.predict_by_feat(
            *output, batch_img_metas=metas, cfg=cfg, with_nms=False
        )
    columns = head.cls_out_channels
    scores, factors = (
        torch.cat(
            [
                x.unflatten(1, (-1, number)).permute(0, 3, 4, 1, 2).flatten(1, 3)
                for x in levels
            ],
            dim=1,
        )
        for levels, number in ((output[0], columns), (output[-1], 1))
    )
    for n, (in_training, rows) in enumerate(zip(*decoded.values(), strict=True)):
        assert len(rows) == scores.shape[1]
        torch.testing.assert_close(in_training, rows)
        found = predicted[n]
        distance = torch.cdist(found.bboxes.double(), rows.double(), p=1)
        assert distance.amin(1).max() < 1e-3
        # `scores` of the prediction is that of its class, at the row of its box
        near = distance < 1e-3
        own = scores[n].T[found.labels]
        own = own if activation_of(head) == 'identity' else own.sigmoid()
        if len(output) > 2:  # centerness
            own = own * factors[n, :, 0].sigmoid()
        error = (own - found.scores[:, None]).abs().masked_fill(~near, 1)
        assert error.amin(1).max() < 1e-4


def test_largest_overlap_against_numpy():
    rng = np.random.default_rng(0)
    corner, size = rng.random((2, 80, 2)) * 50
    both = np.concatenate([corner, corner + 1 + size], 1)
    ours, theirs = both[:30], both[30:]

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        inner = max(w, 0) * max(h, 0)
        areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
        return inner / (sum(areas) - inner)

    expected = np.array([[iou(a, b) for b in theirs] for a in ours])
    for chunk in (7, 1000):
        overlap, best = largest_overlap(
            torch.from_numpy(ours), torch.from_numpy(theirs), chunk
        )
        np.testing.assert_allclose(overlap, expected.max(1), atol=1e-5)
        found = expected[np.arange(len(ours)), best]
        np.testing.assert_allclose(found, expected.max(1), atol=1e-5)


# ---- the rows --------------------------------------------------------------------


@pytest.mark.parametrize('family', ['YOLOX', 'DINO', 'Faster R-CNN'])
def test_a_copy_of_the_student_says_the_same(family):
    model = copy_teacher(FAMILIES[family], boxes())
    if family == 'DINO':  # its loss needs what it computes in training
        model.train()
        model.backbone.eval()
    losses, (rows,), _ = step(model)
    assert rows.mask.all() and len(rows.student) > 20
    torch.testing.assert_close(rows.student, rows.teacher, rtol=1e-3, atol=1e-4)
    assert losses['dist_matched'] == 1
    assert losses['loss_dist'].item() == pytest.approx(0, abs=1e-3)


def test_a_two_stage_teacher_judges_each_box_by_itself():
    """Foreground probabilities of its softmax against the sigmoids of the student."""
    model = pair(RETINANET, FASTER, boxes(top_k=10))
    _, (rows,), data = step(model)
    assert rows.student.shape == rows.teacher.shape == (20, 80) and rows.mask.all()
    teacher = model.teacher.model
    with torch.no_grad():
        outs = model.bbox_head(model.extract_feat(data['inputs']))
        features = teacher.extract_feat(data['inputs'])
        metas = [sample.metainfo for sample in data['data_samples']]
        every_box = decode_boxes(model.bbox_head, outs, 'sigmoid', metas)
        expected = []
        for n, decoded in enumerate(every_box):
            scores = np.concatenate(
                [
                    x[n].numpy().reshape(-1, 80, *x.shape[-2:]).transpose(2, 3, 0, 1)
                    .reshape(-1, 80)
                    for x in outs[0]
                ]
            )  # fmt: skip
            for k in np.argsort(-expit(scores).max(1))[:10]:
                roi = bbox2roi([decoded[k : k + 1]])
                roi[:, 0] = n
                said = teacher.roi_head._bbox_forward(features, roi)['cls_score']
                expected.append((expit(scores[k]), softmax(said[0].numpy())[:-1]))
    both = (rows.student.detach().numpy(), rows.teacher.numpy())
    for side, found in enumerate(both):
        ours = np.stack([x[side] for x in expected])
        order = [np.lexsort(np.round(x[:, :3], 4).T) for x in (ours, found)]
        np.testing.assert_allclose(ours[order[0]], found[order[1]], atol=1e-4)
    assert rows.activation == 'identity'


def test_rows_that_nothing_overlaps_do_not_count(caplog):
    model = pair(FASTER, ATSS, boxes(min_iou=0.6))
    model.teacher.model.bbox_head.atss_reg.bias.data.fill_(-30)  # boxes of no size
    losses, (rows,), _ = step(model)
    assert not rows.mask.any()
    assert losses['loss_dist'] == 0 and losses['dist_matched'] == 0
    logger = MMLogger.get_current_instance()  # it does not propagate
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    for _ in range(WARN_AFTER - 2):
        model.distill['dist']('dist', [rows])
    assert not caplog.messages
    model.distill['dist']('dist', [rows])
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    (message,) = caplog.messages
    assert 'predicted only 0.0% with an IoU of at least 0.6' in message


def test_ground_truth_is_added():
    plain, added = (
        step(pair(RETINANET, CASCADE, boxes(top_k=1, add_gt=gt)))[1][0]
        for gt in (False, True)
    )
    assert len(plain.student) == 2
    assert 2 < len(added.student) <= 2 + 2 * 4  # four boxes an image


def test_joint_scores_are_class_times_centerness():
    model = copy_teacher(ATSS, boxes(top_k=5, score='joint'))
    _, (rows,), data = step(model)
    with torch.no_grad():
        maps, _, centers = model.bbox_head(model.extract_feat(data['inputs']))
    best = []
    for n in range(2):
        joint = [
            (expit(m[n].numpy()) * expit(c[n].numpy())).reshape(80, -1)
            for m, c in zip(maps, centers, strict=True)
        ]
        best.append(np.sort(np.concatenate(joint, 1).max(0))[::-1][:5])
    found = rows.student.detach().amax(1).numpy().reshape(2, 5)
    np.testing.assert_allclose(np.sort(found)[:, ::-1], best, rtol=1e-4)


@pytest.mark.parametrize('is_binary', [True, False])
def test_kl_of_probabilities_is_that_of_the_probabilities(is_binary):
    """A sigmoid learns from a softmax; both KLs by scipy."""
    loss = (
        dict(type='mmdist.BinaryKLDivLoss')
        if is_binary
        else dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=1)
    )
    model = pair(RETINANET, CASCADE, boxes(top_k=10, loss=loss))
    losses, (rows,), _ = step(model)
    assert rows.activation == 'identity'
    student, teacher = (
        x.detach().double().clamp(1e-6, 1 - 1e-6).numpy()
        for x in (rows.student, rows.teacher)
    )
    if is_binary:
        both = rel_entr(teacher, student) + rel_entr(1 - teacher, 1 - student)
        expected = both.sum(1).mean()
    else:
        student, teacher = (x / x.sum(1, keepdims=True) for x in (student, teacher))
        expected = rel_entr(teacher, student).mean()
    assert losses['loss_dist'].item() == pytest.approx(expected, rel=1e-3)
    losses['loss_dist'].backward()
    assert model.bbox_head.retina_cls.weight.grad.abs().max() > 0

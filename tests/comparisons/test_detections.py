"""Detections of any detector, at the student's anchors, proposals or queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Seen, assert_learns, slow
from det_zoo import FAMILIES, batch, build_pair
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from oracles import SIZES, centres, corners, overlaps, reversed_classes, step
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr
from test_det_zoo import CASES
from torch import nn

from mmdist import Pair
from mmdist.comparisons import detections
from mmdist.record import Recorder
from mmdist.registry import MODELS
from mmdist.teachers import match_classes

STUDENTS = ('YOLOX', 'PAA', 'Cascade R-CNN', 'Deformable DETR', 'Sparse R-CNN')
MORE_STUDENTS = (
    *('RetinaNet', 'FCOS', 'ATSS', 'RTMDet', 'TOOD', 'YOLOv3', 'Faster R-CNN', 'HTC'),
    *('DETR', 'DINO', 'DDQ'),
)
TEACHERS = ('FCOS', 'CenterNet', 'Sparse R-CNN')
MORE_TEACHERS = (
    *('RetinaNet', 'YOLOX', 'PAA', 'YOLOv3', 'Mask R-CNN', 'Cascade R-CNN'),
    *('DINO', 'Deformable DETR', 'DDQ', 'HTC'),
)


def pair(student: str, teacher: str, **kwargs) -> nn.Module:
    distill = dict(dist=dict(type='mmdist.Detections', **kwargs))
    return build_pair(FAMILIES[student], FAMILIES[teacher], distill, sizes=SIZES)


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        *((student, 'Mask R-CNN') for student in STUDENTS),
        *(('RetinaNet', teacher) for teacher in TEACHERS),
        *slow((student, 'Mask R-CNN') for student in MORE_STUDENTS),
        *slow(('RetinaNet', teacher) for teacher in MORE_TEACHERS),
        *slow(('Faster R-CNN', teacher) for teacher in ('DINO', 'RTMDet')),
    ],
)
def test_every_detector_teaches(student, teacher):
    model = pair(student, teacher)
    losses, pairs = step(model)
    keys = [k for k in losses if k.startswith('loss_dist')]
    assert len(keys) == (3 if student in ('Cascade R-CNN', 'HTC') else 1)
    assert any(p.teacher.std() > 0 for p in pairs)
    total = sum(losses[k] for k in keys)
    assert 0 < total.item() < 10
    total.backward()
    assert_learns(model.backbone)


def test_the_teacher_predicts_as_in_a_test_on_features_that_are_there():
    """Without masks, which are not needed."""
    model = pair('RetinaNet', 'Mask R-CNN')
    teacher = model.teacher.model
    seen = Seen(backbone=teacher.backbone, masks=teacher.roi_head.mask_head)
    data, asked = batch(model, SIZES), []
    ask = model.distill['dist'].ask
    model.distill['dist'].ask = lambda *args: asked.append(ask(*args)) or asked[0]
    model(**data, mode='loss')
    assert seen.calls == dict(backbone=1, masks=0)
    assert teacher.roi_head.with_mask
    inputs = model.teacher.renormalize(data['inputs'], SIZES)
    samples = [s.clone() for s in data['data_samples']]
    with torch.no_grad():
        wanted = teacher.predict(inputs, samples, rescale=False)
    for found, sample in zip(asked[0], wanted, strict=True):
        for name in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(found[name], sample.pred_instances[name])
        assert len(found) > 5


@pytest.mark.parametrize(
    ('student', 'teacher', 'half'),
    [  # mmcv's RoIAlign takes no bf16
        ('RetinaNet', 'YOLOX', torch.bfloat16),
        *slow([('RetinaNet', 'Faster R-CNN', torch.float16)]),
        *slow([('RetinaNet', 'DINO', torch.bfloat16)]),
        *slow([('DINO', 'YOLOX', torch.bfloat16)]),
    ],
)
def test_a_teacher_in_half_precision_detects_about_the_same(student, teacher, half):
    losses = []
    for dtype in (None, half):
        model = pair(student, teacher)
        model.teacher.dtype = dtype
        nn.Module.to(model.teacher.model, dtype)
        losses.append(step(model)[0]['loss_dist'].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def anchors_of(student: str, stride: int, cells: int) -> np.ndarray:
    """A level's cells x cells anchors, as published, in the order y, x, anchor."""
    if student == 'FCOS':
        offset, sides = 0.5, [(8.0 * stride, 8.0 * stride)]
    else:
        scales = [4 * stride * 2 ** (k / 3) for k in range(3)]
        offset = 0.0
        sides = [(s / r**0.5, s * r**0.5) for r in (0.5, 1, 2) for s in scales]
    boxes = []
    for y, x in np.ndindex(cells, cells):
        cx, cy = (x + offset) * stride, (y + offset) * stride
        boxes += [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for w, h in sides]
    return np.array(boxes)


def as_numpy(one: Pair) -> tuple[np.ndarray, np.ndarray]:
    return tuple(x.detach().double().numpy() for x in (one.student, one.teacher))


FOUND = [  # in the images of 96 x 96 and 72 x 96
    InstanceData(
        bboxes=torch.tensor(
            [[8.0, 8, 40, 42], [10, 9, 44, 40], [50, 50, 95, 90], [2, 50, 30, 75]]
        ),
        scores=torch.tensor([0.9, 0.5, 0.3, 0.2]),
        labels=torch.tensor([79, 79, 0, 0]),
    ),
    InstanceData(
        bboxes=torch.tensor([[60.0, 4, 90, 60]]),
        scores=torch.tensor([0.8]),
        labels=torch.tensor([79]),
    ),
]


@pytest.mark.parametrize('student', ['RetinaNet', 'FCOS'])
def test_rows_are_anchors_with_the_best_score_of_what_overlaps_them(student):
    """Oracle: numpy. The teacher's classes are in another order."""
    model = pair(student, 'Faster R-CNN', min_iou=0.4)
    model.teacher.classes = reversed_classes()
    model.distill['dist'].ask = lambda *args: FOUND
    with Recorder([model.bbox_head]) as recorder:
        losses, _ = step(model)
    maps, *others = recorder.calls(model.bbox_head)[-1].output
    strides = (8, 16, 32, 64, 128)
    cells = [x.shape[-1] for x in maps]
    anchors = [anchors_of(student, *x) for x in zip(strides, cells, strict=True)]
    targets = []
    for found in FOUND:
        found_at = overlaps(np.concatenate(anchors), found.bboxes.double().numpy())
        found_at = (found_at >= 0.4) | (found_at == found_at.max(0))
        target = np.zeros((len(found_at), 80))
        for d, (score, label) in enumerate(
            zip(found.scores, found.labels, strict=True)
        ):
            column = target[:, 79 - label]
            column[found_at[:, d]] = np.maximum(column[found_at[:, d]], score.item())
        targets.append(target)
    targets = np.split(np.stack(targets), np.cumsum([len(x) for x in anchors])[:-1], 1)
    expected = 0.0
    for level, (x, target) in enumerate(zip(maps, targets, strict=True)):
        n, size = cells[level], 96 / cells[level]
        rows = expit(x.detach().double().numpy()).reshape(2, -1, 80, n, n)
        if student == 'FCOS':  # it ranks by class times centerness
            rows = rows * expit(others[1][level].detach().double().numpy())[:, :, None]
        rows = rows.transpose(0, 3, 4, 1, 2).reshape(2, -1, 80)
        counts = np.ones(rows.shape[:2], bool)
        counts[1] = np.repeat((np.arange(n) + 0.5) * size < 72, rows.shape[1] // n)
        present = np.flatnonzero(target.max((0, 1)))
        if len(present):
            both = [(rows[counts][:, c], target[counts][:, c]) for c in present]
            expected += 1 - np.mean(
                [pearsonr(*x)[0] if x[1].std() else 0 for x in both]
            )
    assert losses['loss_dist'].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [
        'tridentnet/tridentnet_r50-caffe_1x_coco.py',
        'crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py',
    ],
)
def test_several_branches_and_several_predictions_of_a_proposal(path):
    case = CASES[path.split('/')[0]]
    distill = dict(dist=dict(type='mmdist.Detections'))
    model = build_pair(path, path, distill, case.factors, case.edit, case.sizes)
    data = batch(model, case.sizes, num_classes=case.num_classes)
    losses = model(**data, mode='loss')
    assert losses['loss_dist'].isfinite() and losses['loss_dist'] > 0


def test_proposals_have_the_best_score_of_what_overlaps_them():
    model = pair('Faster R-CNN', 'RetinaNet')
    model.distill['dist'].ask = lambda *args: FOUND
    extractor = model.roi_head.bbox_roi_extractor
    with Recorder([extractor]) as recorder:
        _, (one,) = step(model)
    rois = recorder.calls(extractor)[-1].args[1].double().numpy()
    assert one.student.shape == one.teacher.shape == (len(rois), 80)
    expected = np.zeros(one.teacher.shape)
    for row, (image, *box) in zip(expected, rois, strict=True):
        found = FOUND[int(image)]
        at = overlaps(np.array([box]), found.bboxes.double().numpy())[0] >= 0.5
        for label in (0, 79):
            scores = found.scores.numpy()[at & (found.labels.numpy() == label)]
            row[label] = scores.max(initial=0)
    np.testing.assert_allclose(one.teacher, expected, atol=1e-6)
    assert 0 < (expected > 0).mean() < 1


@pytest.mark.parametrize('student', ['DETR', *slow(['DINO'])])
def test_queries_are_assigned_to_the_detections_one_to_one(student):
    model = pair(student, 'RetinaNet')
    model.distill['dist'].ask = lambda *args: FOUND
    with Recorder([model.bbox_head]) as recorder:
        _, (one,) = step(model)
    number = model.num_queries
    logits, boxes = (
        x[-1][:, -number:].detach().double().numpy()
        for x in recorder.calls(model.bbox_head)[-1].output
    )
    expected = np.zeros((len(one.teacher), 80))
    for image, found in enumerate(FOUND):
        row = logits[image]
        student_probs = expit(row) if student == 'DINO' else softmax(row, 1)[:, :-1]
        probs = np.zeros((len(found), 80))
        probs[range(len(found)), found.labels] = found.scores
        height, width = SIZES[image]
        size = np.array([width, height, width, height])
        theirs = found.bboxes.double().numpy()
        ours = corners(boxes[image]) * size
        costs = 2 * cdist(student_probs, probs, 'cityblock')
        costs += 5 * cdist(centres(ours / size), centres(theirs / size), 'cityblock')
        costs -= 2 * overlaps(ours, theirs, generalized=True)
        rows, columns = linear_sum_assignment(costs)
        assert len(rows) == len(found)
        expected[image * number + rows] = probs[columns]
    np.testing.assert_allclose(one.teacher, expected, atol=1e-6)
    assert one.student.shape == expected.shape


def test_where_nothing_is_detected_nothing_is_learned():
    model = pair('RetinaNet', 'Faster R-CNN')
    model.distill['dist'].ask = lambda *args: [found[:0] for found in FOUND]
    losses, _ = step(model)
    assert losses['loss_dist'] == 0
    losses['loss_dist'].backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    'loss',
    [
        dict(type='mmdist.DISTLoss', beta=0.0),
        dict(type='mmdist.BinaryKLDivLoss'),
        dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=1),
    ],
    ids=['DIST', 'binary', 'KL'],
)
def test_kl_sees_all_classes_and_dist_those_that_are_there(loss):
    """A class without detections has no relation. Oracle of both KLs: scipy."""
    model = pair('Faster R-CNN', 'RetinaNet', loss=loss)
    model.distill['dist'].ask = lambda *args: FOUND
    losses, (one,) = step(model)
    student, teacher = as_numpy(one)
    if loss['type'] == 'mmdist.DISTLoss':
        expected = 1 - np.mean(
            [pearsonr(student[:, c], teacher[:, c])[0] for c in (0, 79)]
        )
    else:
        s, t = (x.clip(1e-6, 1 - 1e-6) for x in (student, teacher))
        if 'Binary' in loss['type']:
            expected = (rel_entr(t, s) + rel_entr(1 - t, 1 - s)).sum(1).mean()
        else:
            s, t = (x / x.sum(1, keepdims=True) for x in (s, t))
            expected = rel_entr(t, s).mean()
    assert losses['loss_dist'].item() == pytest.approx(expected, rel=1e-3)


def test_proposals_of_images_without_labels_count():
    """They pass through the heads separately, and contain other classes."""
    model = pair('Faster R-CNN', 'RetinaNet')
    data = batch(model, SIZES)
    data['data_samples'][0].set_metainfo(dict(unlabelled=True))
    truth = data['data_samples'][1].gt_instances.bboxes  # they are proposals too
    ones = torch.ones(len(truth))
    found = InstanceData(bboxes=truth, scores=0.6 * ones, labels=5 * ones.long())
    model.distill['dist'].ask = lambda step, _: [
        found if step.labelled[0] else FOUND[0]
    ]
    losses, (one,) = step(model, data)
    student, teacher = as_numpy(one)
    assert len(teacher) == 128 and teacher[:64, 5].any() and teacher[64:, 79].any()
    there = np.flatnonzero(teacher.max(0))
    relations = [pearsonr(student[:, c], teacher[:, c])[0] for c in there]
    assert losses['loss_dist'].item() == pytest.approx(1 - np.mean(relations), rel=1e-3)


def test_classes_that_the_student_does_not_know_are_dropped():
    model = pair('RetinaNet', 'Faster R-CNN')
    names = [f'class {i}' for i in range(80)]
    model.teacher.classes = match_classes(
        names, [*names[:79], 'other'], class_match='shared'
    )
    model.distill['dist'].ask = lambda *args: FOUND
    _, pairs = step(model)
    assert max(p.teacher.amax() for p in pairs) == pytest.approx(0.3)  # 0.9 is `other`


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        ('CenterNet', 'RetinaNet', 'its head has no anchors or points'),
        ('RetinaNet', 'SOLO', 'it detects no boxes'),
    ],
)
def test_what_cannot_be_compared_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        pair(student, teacher)


def test_places_are_compared_in_chunks(monkeypatch):
    corners = torch.rand(2, 20, 2, generator=torch.manual_seed(0))
    places, boxes = (torch.cat([xy, xy + 0.5], 1) for xy in corners)
    wanted = bbox_overlaps(places, boxes)
    monkeypatch.setattr(detections, 'CHUNK', 7)
    found = detections.assign(places, boxes, 0.5, 'overlap')
    assert torch.equal(found, torch.where(wanted >= 0.5, wanted, 0))


def rows_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one process: each has different classes, and the last has no rows."""
    g = torch.Generator().manual_seed(rank)
    student, teacher = torch.rand((2, 20, 6), generator=g).double()
    teacher *= torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0], [0] * 6])[rank]
    return (student, teacher) if rank < 2 else (student[:0], teacher[:0])


def compare(student: torch.Tensor, teacher: torch.Tensor, sync: bool) -> torch.Tensor:
    loss = dict(type='mmdist.DISTLoss', beta=0.0, sync=sync)
    comparison = MODELS.build(dict(type='mmdist.Detections', loss=loss))
    pair = Pair(student, teacher, activation='identity')
    return comparison.forward('dist', [pair])['loss_dist']


def compare_in_one() -> tuple[float, torch.Tensor]:
    student, teacher = rows_of(torch.distributed.get_rank())
    loss = compare(student.requires_grad_(), teacher, sync=True)
    loss.backward()
    return loss.item(), student.grad


@pytest.mark.slow
def test_processes_that_see_other_classes_are_one_process_with_all(group_of):
    values, gradients = zip(*group_of(3)(compare_in_one), strict=True)
    student, teacher = (torch.cat(x) for x in zip(*map(rows_of, range(3)), strict=True))
    loss = compare(student.requires_grad_(), teacher, sync=False)
    loss.backward()
    # DDP averages over the processes
    torch.testing.assert_close(torch.cat(gradients) / 3, student.grad)
    assert list(values) == pytest.approx([loss.item()] * 3, rel=1e-6)
    relations = [pearsonr(student.detach()[:, c], teacher[:, c])[0] for c in (0, 1, 4)]
    assert loss.item() == pytest.approx(1 - np.mean(relations), rel=1e-6)

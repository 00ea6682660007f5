"""The teacher's predicted boxes as targets for the student's boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Seen, assert_learns, slow, without_dropout
from det_zoo import FAMILIES, batch, build_pair
from mmengine.structures import InstanceData
from oracles import SIZES, centres, corners, overlaps, reversed_classes, step
from scipy.special import softmax
from torch import nn

from mmdist.families import dense
from mmdist.families.box_codes import decode, encoded
from mmdist.teachers import ClassMatch

RETINANET, ATSS, FASTER, CASCADE, DINO = (
    FAMILIES[name]
    for name in ('RetinaNet', 'ATSS', 'Faster R-CNN', 'Cascade R-CNN', 'DINO')
)
QUICK = ('RetinaNet', 'GFL', 'RTMDet', 'YOLOX', 'TOOD', 'VFNet')
BOXES_OF = [
    *(FAMILIES[name] for name in QUICK),
    *slow(FAMILIES[name] for name in ('FCOS', 'ATSS', 'FreeAnchor', 'FSAF')),
]
NORMED_FCOS = (
    'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py'
)


def pair(student: str, teacher: str | None = None, factors=(8, 4), **kwargs):
    kwargs = dict(min_score=0.0) | kwargs
    distill = dict(box=dict(type='mmdist.Boxes', **kwargs))
    return build_pair(student, teacher, distill, factors, sizes=SIZES)


def copy_of_the_student(path: str, **kwargs) -> nn.Module:
    model = pair(path, factors=(8, 8), **kwargs)
    for name, parameter in model.named_parameters():
        if 'retina_reg' in name or 'fc_reg' in name:
            parameter.data *= 0.01  # box coders clip large changes, cascades explode
    model.teacher.model.load_state_dict(model.state_dict(), strict=False)
    without_dropout(model)
    # these losses need outputs that their heads return only in training mode
    return model if 'vfnet' in path or hasattr(model, 'decoder') else model.eval()


@pytest.mark.parametrize(
    'name',
    [
        *('RetinaNet', 'GFL', 'YOLOX', 'Cascade R-CNN', 'Deformable DETR'),
        *slow(('FCOS', 'ATSS', 'RTMDet', 'TOOD', 'VFNet', 'FreeAnchor', 'FSAF')),
        *slow(('Faster R-CNN', 'DINO', 'Sparse R-CNN')),
    ],
)
def test_a_student_learns_boxes(name):
    model = pair(FAMILIES[name])
    losses, _ = step(model)
    terms = [v for k, v in losses.items() if k.startswith('loss_box')]
    assert len(terms) == (3 if name == 'Cascade R-CNN' else 1)
    assert all(0 < term.item() < 1e4 for term in terms)
    sum(terms).backward()
    assert_learns(model.backbone)


@pytest.mark.parametrize(
    'name',
    [
        *('FCOS', 'TOOD', 'VFNet', 'Faster R-CNN', 'Sparse R-CNN'),
        *slow(('RetinaNet', 'ATSS', 'GFL', 'RTMDet', 'YOLOX', 'FreeAnchor')),
        *slow(('Cascade R-CNN', 'Deformable DETR', 'DINO')),
    ],
)
def test_a_copy_of_the_student_teaches_nothing(name):
    """Except FSAF, whose loss modifies what its head returned."""
    model = copy_of_the_student(FAMILIES[name])
    losses, pairs = step(model)
    total = sum(v for k, v in losses.items() if k.startswith('loss_box'))
    assert total.item() == pytest.approx(0, abs=1e-4)
    assert all((p.row_weight > 0).any() for p in pairs)


@pytest.mark.parametrize('path', [*BOXES_OF, NORMED_FCOS])
def test_boxes_of_locations_are_those_that_the_head_predicts(path):
    """Oracle: boxes and their scores by the head's own ``predict_by_feat``."""
    model = pair(path).eval()
    data = batch(model, SIZES)
    head, metas = model.bbox_head, [s.metainfo for s in data['data_samples']]
    cfg = head.test_cfg.copy()
    cfg.update(score_thr=0.0, nms_pre=20, min_bbox_size=-1)
    with torch.no_grad():
        features = model.extract_feat(data['inputs'])
        output = head(features)
        ours = decode(head, encoded(head, output))
        predicted = head.predict_by_feat(
            *output, batch_img_metas=metas, cfg=cfg, with_nms=False
        )
        head.training = True  # some heads then encode their boxes differently
        torch.testing.assert_close(decode(head, encoded(head, head(features))), ours)
    levels = dense.scores_of(head, output, 'joint')
    scores = torch.cat([x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], 1)
    for boxes, score, found, meta in zip(ours, scores, predicted, metas, strict=True):
        height, width = meta['img_shape'][:2]
        limit = boxes.new_tensor([width, height, width, height])
        if 'yolox' not in path and 'tood' not in path:  # TOOD and YOLOX do not clip
            boxes = boxes.clamp(min=0).minimum(limit)
        distance = torch.cdist(found.bboxes.double(), boxes.double(), p=1)
        error = (score.T[found.labels] - found.scores[:, None]).abs()
        assert len(found) > 20
        assert error.masked_fill(distance > 1e-2, 1).amin(1).max() < 1e-4


def numpy_decode(rois: np.ndarray, deltas: np.ndarray, stds: list) -> np.ndarray:
    """Girshick et al., CVPR 2014, appendix C."""
    rois, (shift, scale) = centres(rois), np.split(deltas * stds, 2, 1)
    limit = -np.log(16 / 1000)
    centre = rois[:, :2] + shift * rois[:, 2:]
    size = rois[:, 2:] * np.exp(scale.clip(-limit, limit))
    return corners(np.concatenate([centre, size], 1))


def numpy_encode(rois: np.ndarray, boxes: np.ndarray, stds: list) -> np.ndarray:
    rois, boxes = centres(rois), centres(boxes)
    shift = (boxes[:, :2] - rois[:, :2]) / rois[:, 2:]
    return np.concatenate([shift, np.log(boxes[:, 2:] / rois[:, 2:])], 1) / stds


@pytest.mark.parametrize('in_pixels', [True, False])
def test_the_target_is_the_box_of_the_teachers_best_class(in_pixels):
    """Oracle: numpy. The teacher's classes are in another order."""
    loss = dict(type='mmdet.GIoULoss') if in_pixels else dict(type='mmdet.L1Loss')
    model = pair(FASTER, FASTER, loss=loss, min_score=0.2, weight=3.0)
    model.teacher.classes = reversed_classes()
    ours, theirs = (m.roi_head for m in (model, model.teacher.model))
    seen = Seen(
        rois=ours.bbox_roi_extractor, ours=ours.bbox_head, theirs=theirs.bbox_head
    )
    losses, (one,) = step(model)
    rois = seen.inputs['rois'][-1][1].double().numpy()[:, 1:]
    (_, code), (logits, deltas) = (
        [x.detach().double().numpy() for x in seen.outputs[side][-1]]
        for side in ('ours', 'theirs')
    )
    scores = softmax(logits, axis=1)[:, :-1]
    best, rows = scores.argmax(1), np.arange(len(scores))
    weight = np.where(scores.max(1) >= 0.2, scores.max(1), 0)
    stds = [0.1, 0.1, 0.2, 0.2]
    target = numpy_decode(rois, deltas.reshape(len(rows), -1, 4)[rows, best], stds)
    own = code.reshape(len(rows), -1, 4)[rows, 79 - best]
    if in_pixels:
        own = numpy_decode(rois, own, stds)
        values = 1 - overlaps(own, target, generalized=True).diagonal()
    else:
        values = np.abs(own - numpy_encode(rois, target, stds)).sum(1)
    assert 0 < (weight > 0).sum() < len(rows)
    wanted = 3 * (weight * values).sum() / weight.sum()
    np.testing.assert_allclose(one.row_weight.double(), weight, atol=1e-6)
    assert losses['loss_box'].item() == pytest.approx(wanted, rel=1e-4)


def test_two_entries_ask_the_teachers_head_once():
    distill = dict(dist=dict(type='mmdist.RoILogits'), box=dict(type='mmdist.Boxes'))
    model = build_pair(FASTER, FASTER, distill, (8, 8), sizes=SIZES)
    seen = Seen(head=model.teacher.model.roi_head.bbox_head)
    losses = model(**batch(model, SIZES), mode='loss')
    assert seen.calls == dict(head=1)
    assert {'loss_dist', 'loss_box', 'loss_bbox'} <= losses.keys()


def test_images_without_labels_count_as_well():
    """Proposals of labelled and unlabelled images are rows with their own weights."""
    model = pair(FASTER)
    data = batch(model, SIZES)
    data['data_samples'][1].set_metainfo(dict(unlabelled=True))
    losses, (one,) = step(model, data)
    weight, student, teacher = (
        x.detach().double().numpy() for x in (one.row_weight, one.student, one.teacher)
    )
    assert len(weight) == len(student) == 2 * 64  # `num` of the small sampler is 64
    values = np.abs(student - teacher).sum(1)
    wanted = (weight * values).sum() / weight.sum()
    assert losses['loss_box'].item() == pytest.approx(wanted, rel=1e-4)


def rows_below(height: int) -> torch.Tensor:
    """Mask of the RetinaNet anchors in a 96 x 96 image centred at or below `height`."""
    lower = []
    for cells in (12, 6, 3, 2, 1):
        y = (torch.arange(cells) + 0.5) * (96 / cells)
        lower.append((y >= height).repeat_interleave(9 * cells))
    return torch.cat(lower)


def test_padding_and_what_the_teacher_is_unsure_of_do_not_count():
    model = pair(RETINANET)
    data = batch(model, SIZES)
    _, (one,) = step(model, data)
    rows = one.row_weight.view(len(SIZES), -1)
    lower = rows_below(72)  # in the padding of the second image
    assert rows[1, lower].eq(0).all() and rows[1, ~lower].gt(0).all()
    assert rows[0].gt(0).all()
    limit = one.row_weight.median().item()
    _, (other,) = step(pair(RETINANET, min_score=limit), data)
    wanted = torch.where(one.row_weight >= limit, one.row_weight, 0)
    assert torch.equal(other.row_weight, wanted)


@pytest.mark.parametrize('path', [FASTER, *slow([DINO])])
def test_a_teacher_that_is_sure_of_nothing_teaches_nothing(path):
    losses, _ = step(pair(path, min_score=0.99))
    assert losses['loss_box'] == 0


@pytest.mark.parametrize(
    ('path', 'loss'),
    [
        *((RETINANET, loss) for loss in ('GIoULoss', 'L1Loss')),
        *((FASTER, loss) for loss in ('GIoULoss', 'L1Loss')),
        (DINO, 'GIoULoss'),
    ],
)
def test_a_teacher_of_another_family_teaches_what_it_detects(path, loss):
    """By hand: the best detection with IoU >= 0.5, or with its best IoU at this row."""
    teacher = RETINANET if path == FASTER else CASCADE
    model = pair(path, teacher, loss=dict(type=f'mmdet.{loss}'), min_score=0.4)
    is_dense, in_pixels = path == RETINANET, loss == 'GIoULoss'
    rng = np.random.default_rng(0)
    data = batch(model, SIZES)
    boxes = data['data_samples'][0].gt_instances.bboxes.numpy()  # also proposals
    if is_dense:  # add one in the padding of the second image
        boxes = np.concatenate([boxes, [[20, 70, 60, 96]]])
    scores, labels = rng.uniform(0.2, 1, len(boxes)), rng.integers(0, 80, len(boxes))
    found = InstanceData(
        bboxes=torch.tensor(boxes).float(),
        scores=torch.tensor(scores).float(),
        labels=torch.tensor(labels),
    )
    model.distill['box'].ask = lambda *_: [found, found if is_dense else found[:0]]
    losses, (one,) = step(model, data)
    assert losses['loss_box'] > 0
    losses['loss_box'].backward()
    weight = one.row_weight.numpy()
    if path == DINO:
        assert sorted(weight[weight > 0]) == pytest.approx(
            sorted(scores[scores >= 0.4])
        )
        return
    if is_dense:
        places = torch.cat(dense.anchors(model.bbox_head, maps_of(SIZES[0]))).numpy()
        weight, padded = weight.reshape(2, len(places))
        iou = overlaps(places, boxes)
        least = np.minimum(iou.max(0), 0.5)
        iou = np.where(iou >= least, iou, 0)
        best = iou.argmax(1)
        wanted = np.where(iou.max(1) > 0, scores[best], 0) * (scores[best] >= 0.4)
        np.testing.assert_allclose(weight, wanted, atol=1e-6)
        inside = ~rows_below(72).numpy()
        assert (wanted * ~inside).any()
        np.testing.assert_allclose(padded, wanted * inside, atol=1e-6)
        if in_pixels:
            target = one.teacher[: len(places)].numpy()[weight > 0]
            np.testing.assert_allclose(target, boxes[best][weight > 0], rtol=1e-5)
    if path == FASTER and in_pixels:
        target = one.teacher.numpy()[weight > 0]
        of = np.abs(target[:, None] - boxes).sum(-1)
        assert of.min(1).max() < 1e-3
        np.testing.assert_allclose(weight[weight > 0], scores[of.argmin(1)], rtol=1e-5)
    assert (weight > 0).sum() >= 3


def test_a_proposal_is_regressed_for_the_students_own_class():
    """Labels index the common classes; the student's columns are in reverse order."""
    model = pair(FASTER, RETINANET, loss=dict(type='mmdet.GIoULoss'))
    data = batch(model, SIZES)
    boxes = data['data_samples'][0].gt_instances.bboxes.float()
    labels = torch.arange(len(boxes)) % 80
    codes = []
    for match, own in (
        (ClassMatch([(79 - i,) for i in range(80)], None, 80, 80), labels),
        (ClassMatch(), 79 - labels),
    ):
        found = InstanceData(
            bboxes=boxes, scores=torch.ones(len(boxes)), labels=own.clone()
        )
        model.teacher.classes = match
        model.distill['box'].ask = lambda *_, found=found: [found, found[:0]]
        torch.manual_seed(0)
        _, (one,) = step(model, data)
        codes.append(one.student[one.row_weight > 0])
    assert len(codes[0]) >= 3 and torch.equal(*codes)


def maps_of(size) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, *(-(-side // s) for side in size)) for s in STRIDES]


STRIDES = (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (RETINANET, ATSS, 'anchors per location'),
        (FASTER, 'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py', 'SABLHead encodes'),
        ('paa/paa_r50_fpn_1x_coco.py', ATSS, 'PAAHead encodes'),
    ],
)
def test_what_has_no_common_boxes_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        pair(student, teacher)


def test_boxes_of_queries_are_compared_in_pixels():
    with pytest.raises(ValueError, match='`loss` must be an IoU loss'):
        pair(DINO, loss=dict(type='mmdet.L1Loss'))

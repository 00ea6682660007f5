"""The boxes that a teacher predicts, as targets of the student's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from det_zoo import FAMILIES, batch, build_pair, keep_transformer
from scipy.special import softmax
from torch import nn

from mmdist.comparisons.decode import decode, decode_boxes, encoded
from mmdist.comparisons.dense_logits import activation_of
from mmdist.record import Recorder
from mmdist.teachers import match_classes

RETINANET, ATSS, FASTER, CASCADE, DINO = (
    FAMILIES[name]
    for name in ('RetinaNet', 'ATSS', 'Faster R-CNN', 'Cascade R-CNN', 'DINO')
)
DENSE = (
    *('RetinaNet', 'FCOS', 'ATSS', 'GFL', 'RTMDet'),
    *('YOLOX', 'TOOD', 'VFNet', 'FreeAnchor', 'FSAF'),
)
OTHERS = ('Faster R-CNN', 'Cascade R-CNN', 'Deformable DETR', 'DINO', 'Sparse R-CNN')
SIZES = ((96, 96), (72, 96))


def for_its_family(cfg, original, factor):
    if original.type == 'DINO':
        keep_transformer(cfg, original, factor)


def pair(student: str, teacher: str | None = None, factors=(8, 4), **kwargs):
    kwargs = dict(min_score=0.0) | kwargs
    distill = dict(box=dict(type='mmdist.Boxes', **kwargs))
    return build_pair(student, teacher, distill, factors, for_its_family, SIZES)


def copy_of_the_student(path: str, **kwargs) -> nn.Module:
    model = pair(path, factors=(8, 8), **kwargs)
    for name, parameter in model.named_parameters():
        if 'retina_reg' in name or 'fc_reg' in name:
            parameter.data *= 0.01  # box coders clip large changes, cascades explode
    model.teacher.model.load_state_dict(model.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    # the losses of these ask for what their heads return in training alone
    return model if 'vfnet' in path or hasattr(model, 'decoder') else model.eval()


def step(model: nn.Module) -> tuple[dict, list]:
    """The losses and the pairs of one loss pass."""
    comparison = model.distill['box']
    with Recorder([comparison]) as recorder:
        losses = model(**batch(model, SIZES), mode='loss')
    return losses, recorder.calls(comparison)[0].args[1]


@pytest.mark.parametrize('name', [*DENSE, *OTHERS])
def test_a_student_learns_boxes(name):
    model = pair(FAMILIES[name])
    losses, _ = step(model)
    terms = [v for k, v in losses.items() if k.startswith('loss_box')]
    assert len(terms) == (3 if name == 'Cascade R-CNN' else 1)
    assert all(0 < term.item() < 1e4 for term in terms)
    sum(terms).backward()
    grads = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert any(grad.abs().max() > 0 for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('name', [x for x in (*DENSE, *OTHERS) if x != 'FSAF'])
def test_a_copy_of_the_student_teaches_nothing(name):
    """But for FSAF, whose loss changes what its head returned."""
    model = copy_of_the_student(FAMILIES[name])
    losses, pairs = step(model)
    total = sum(v for k, v in losses.items() if k.startswith('loss_box'))
    assert total.item() == pytest.approx(0, abs=1e-4)
    assert all((p.row_weight > 0).any() for p in pairs)


@pytest.mark.parametrize('name', DENSE)
def test_boxes_of_locations_are_those_that_the_head_predicts(name):
    """Oracle: the head's own ``predict_by_feat``, which clips them to the image."""
    model = pair(FAMILIES[name]).eval()
    data = batch(model, SIZES)
    head, metas = model.bbox_head, [s.metainfo for s in data['data_samples']]
    with torch.no_grad():
        output = head(model.extract_feat(data['inputs']))
        ours = decode(head, encoded(head, output))
    theirs = decode_boxes(head, output, activation_of(head), metas)
    for boxes, wanted, meta in zip(ours, theirs, metas, strict=True):
        height, width = meta['img_shape'][:2]
        limit = boxes.new_tensor([width, height, width, height])
        if name not in ('YOLOX', 'TOOD'):  # whose predict does not clip
            boxes = boxes.clamp(min=0).minimum(limit)
        torch.testing.assert_close(boxes, wanted, rtol=1e-4, atol=1e-3)


def numpy_decode(rois: np.ndarray, deltas: np.ndarray, stds: list) -> np.ndarray:
    """Girshick et al., CVPR 2014, appendix C."""
    dx, dy, dw, dh = (deltas * stds).T
    w, h = rois[:, 2] - rois[:, 0], rois[:, 3] - rois[:, 1]
    x = (rois[:, 0] + rois[:, 2]) / 2 + dx * w
    y = (rois[:, 1] + rois[:, 3]) / 2 + dy * h
    limit = -np.log(16 / 1000)
    w, h = w * np.exp(dw.clip(-limit, limit)), h * np.exp(dh.clip(-limit, limit))
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)


def numpy_encode(rois: np.ndarray, boxes: np.ndarray, stds: list) -> np.ndarray:
    centres = [(x[:, :2] + x[:, 2:]) / 2 for x in (rois, boxes)]
    sizes = [x[:, 2:] - x[:, :2] for x in (rois, boxes)]
    shift = (centres[1] - centres[0]) / sizes[0]
    return np.concatenate([shift, np.log(sizes[1] / sizes[0])], 1) / stds


def numpy_giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rezatofighi et al., CVPR 2019, algorithm 1."""

    def area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (high - low).clip(0).prod(1)

    inner = area(np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:]))
    outer = area(np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:]))
    union = area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - inner
    return inner / union - (outer - union) / outer


@pytest.mark.parametrize('in_pixels', [True, False])
def test_the_target_is_the_box_of_the_teachers_best_class(in_pixels):
    """In numpy, with a teacher whose classes are in another order."""
    loss = dict(type='mmdet.GIoULoss') if in_pixels else dict(type='mmdet.L1Loss')
    model = pair(FASTER, FASTER, loss=loss, min_score=0.2, weight=3.0)
    student = [f'class {i}' for i in range(80)]
    model.teacher.classes = match_classes(student, student[::-1])
    ours, theirs = (m.roi_head for m in (model, model.teacher.model))
    with Recorder(
        [ours.bbox_roi_extractor, ours.bbox_head, theirs.bbox_head]
    ) as recorder:
        losses, (one,) = step(model)
    rois = recorder.calls(ours.bbox_roi_extractor)[-1].args[1].double().numpy()[:, 1:]
    (_, code), (logits, deltas) = (
        [x.detach().double().numpy() for x in recorder.calls(head)[-1].output]
        for head in (ours.bbox_head, theirs.bbox_head)
    )
    scores = softmax(logits, axis=1)[:, :-1]
    best, rows = scores.argmax(1), np.arange(len(scores))
    weight = np.where(scores.max(1) >= 0.2, scores.max(1), 0)
    stds = [0.1, 0.1, 0.2, 0.2]
    target = numpy_decode(rois, deltas.reshape(len(rows), -1, 4)[rows, best], stds)
    own = code.reshape(len(rows), -1, 4)[rows, 79 - best]
    if in_pixels:
        own = numpy_decode(rois, own, stds)
        values = 1 - numpy_giou(own, target)
    else:
        values = np.abs(own - numpy_encode(rois, target, stds)).sum(1)
    assert 0 < (weight > 0).sum() < len(rows)
    wanted = 3 * (weight * values).sum() / weight.sum()
    np.testing.assert_allclose(one.row_weight.double(), weight, atol=1e-6)
    assert losses['loss_box'].item() == pytest.approx(wanted, rel=1e-4)


def test_two_entries_ask_the_teachers_head_once():
    distill = dict(dist=dict(type='mmdist.RoILogits'), box=dict(type='mmdist.Boxes'))
    model = build_pair(FASTER, FASTER, distill, (8, 8), sizes=SIZES)
    head = model.teacher.model.roi_head.bbox_head
    with Recorder([head]) as recorder:
        losses = model(**batch(model, SIZES), mode='loss')
    assert len(recorder.calls(head)) == 1
    assert {'loss_dist', 'loss_box', 'loss_bbox'} <= losses.keys()


def test_images_without_labels_count_as_well():
    """The proposals of both parts of the batch are rows, with their own weights."""
    model = pair(FASTER)
    data = batch(model, SIZES)
    data['data_samples'][1].set_metainfo(dict(unlabelled=True))
    comparison = model.distill['box']
    with Recorder([comparison]) as recorder:
        losses = model(**data, mode='loss')
    (one,) = recorder.calls(comparison)[0].args[1]
    weight, student, teacher = (
        x.detach().double().numpy() for x in (one.row_weight, one.student, one.teacher)
    )
    assert len(weight) == len(student) == 2 * 64  # `num` of the small sampler is 64
    values = np.abs(student - teacher).sum(1)
    wanted = (weight * values).sum() / weight.sum()
    assert losses['loss_box'].item() == pytest.approx(wanted, rel=1e-4)


def test_padding_and_what_the_teacher_is_unsure_of_do_not_count():
    model = pair(RETINANET)
    _, (one,) = step(model)
    rows = one.row_weight.view(len(SIZES), -1)
    lower = []  # anchors whose centre is in the padding of the second image
    for cells in (12, 6, 3, 2, 1):
        y = (torch.arange(cells) + 0.5) * (96 / cells)
        lower.append((y >= 72).repeat_interleave(9 * cells))
    lower = torch.cat(lower)
    assert rows[1, lower].eq(0).all() and rows[1, ~lower].gt(0).all()
    assert rows[0].gt(0).all()
    limit = one.row_weight.median().item()
    _, (other,) = step(pair(RETINANET, min_score=limit))
    wanted = torch.where(one.row_weight >= limit, one.row_weight, 0)
    assert torch.equal(other.row_weight, wanted)


@pytest.mark.parametrize('path', [FASTER, DINO])
def test_a_teacher_that_is_sure_of_nothing_teaches_nothing(path):
    model = pair(path, min_score=0.99)
    losses, _ = step(model)
    assert losses['loss_box'] == 0


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (RETINANET, CASCADE, 'rows of two detectors of one family'),
        (RETINANET, ATSS, 'anchors per location'),
        (FASTER, 'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py', 'SABLHead encodes'),
        ('paa/paa_r50_fpn_1x_coco.py', ATSS, 'PAAHead encodes'),
    ],
)
def test_what_has_no_common_boxes_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        pair(student, teacher)


def test_options_are_checked():
    with pytest.raises(ValueError, match='`min_score` is a probability'):
        pair(RETINANET, min_score=1.0)
    with pytest.raises(ValueError, match='`loss` is one of IoU type'):
        pair(DINO, loss=dict(type='mmdet.L1Loss'))

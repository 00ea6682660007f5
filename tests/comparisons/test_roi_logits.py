from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from builders import Seen, slow
from det_zoo import FAMILIES, batch, build_pair
from oracles import dist
from scipy.special import softmax as softmax_over
from test_det_zoo import few_proposals
from torch import nn

FASTER, CASCADE, CASCADE_MASK, HTC, SPARSE, RETINANET = (
    FAMILIES[name]
    for name in (
        *('Faster R-CNN', 'Cascade R-CNN', 'Cascade Mask R-CNN', 'HTC'),
        *('Sparse R-CNN', 'RetinaNet'),
    )
)
OHEM = 'faster_rcnn/faster-rcnn_r50_fpn_ohem_1x_coco.py'
SEESAW = 'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py'
TRIDENT = 'tridentnet/tridentnet_r50-caffe_1x_coco.py'

# If all classes are about equally likely, the default eps shows in the fifth digit.
EXACT = dict(type='mmdist.DISTLoss', eps=0)


softmax = partial(softmax_over, axis=1)


def roi(**kwargs) -> dict:
    return dict(dist=dict(type='mmdist.RoILogits', **kwargs))


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def teacher_logits(model, data, rois, stage) -> np.ndarray:
    """Logits of one stage of a cascade teacher, by its own modules."""
    teacher = model.teacher.model
    extractor = teacher.roi_head.bbox_roi_extractor[stage]
    head = teacher.roi_head.bbox_head[stage]
    with torch.no_grad():
        features = teacher.extract_feat(data['inputs'])
        return numpy(head(extractor(features[:4], rois))[0])


@pytest.mark.parametrize(
    ('stage', 'background'),
    [(None, True), ('mean', False), *slow([(0, True), (2, False)])],
)
def test_rows_against_numpy(stage, background):
    model = build_pair(FASTER, CASCADE, roi(stage=stage, background=background))
    seen = Seen(
        extractor=model.roi_head.bbox_roi_extractor, head=model.roi_head.bbox_head
    )
    data = batch(model)
    losses = model(**data, mode='loss')

    ((_, rois),) = seen.inputs['extractor']
    boxes = torch.cat([s.gt_instances.bboxes for s in data['data_samples']])
    assert set(map(tuple, boxes.tolist())) <= set(map(tuple, rois[:, 1:].tolist()))
    stages = {None: [0], 'mean': [0, 1, 2]}.get(stage, [stage])
    of_teacher = np.mean([teacher_logits(model, data, rois, s) for s in stages], axis=0)
    of_student = numpy(seen.outputs['head'][0][0])
    assert of_student.shape == of_teacher.shape == (len(rois), 81)
    columns = slice(None) if background else slice(0, 80)
    expected = dist(softmax(of_student[:, columns]), softmax(of_teacher[:, columns]))
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-4)


def test_a_cascade_student_gives_a_term_per_stage_with_the_weights_of_its_stages():
    model = build_pair(CASCADE, distill=roi())
    head, stages = model.roi_head, range(3)
    seen = Seen(
        **{f'extractor{i}': head.bbox_roi_extractor[i] for i in stages},
        **{f'head{i}': head.bbox_head[i] for i in stages},
    )
    data = batch(model)
    losses = model(**data, mode='loss')
    for stage, weight in zip(stages, (1, 0.5, 0.25), strict=True):
        rois = seen.inputs[f'extractor{stage}'][0][1]
        of_student = numpy(seen.outputs[f'head{stage}'][0][0])
        of_teacher = teacher_logits(model, data, rois, stage)
        expected = weight * dist(softmax(of_student), softmax(of_teacher))
        assert losses[f'loss_dist_s{stage}'].item() == pytest.approx(expected, abs=1e-4)
        assert f'dist_s{stage}_inter' in losses


def test_a_cascade_student_uses_the_last_stages_of_a_shorter_teacher():
    model = build_pair(CASCADE, FASTER, roi())
    seen = Seen(head=model.teacher.model.roi_head.bbox_head)
    losses = model(**batch(model), mode='loss')
    assert len(seen.outputs['head']) == 3
    assert {'loss_dist_s0', 'loss_dist_s1', 'loss_dist_s2'} <= losses.keys()


def test_samplers_that_call_the_head_do_not_change_the_rows():
    """OHEM runs the bbox head on all proposals before it samples."""
    model = build_pair(OHEM, FASTER, roi())
    seen = Seen(
        head=model.roi_head.bbox_head, asked=model.teacher.model.roi_head.bbox_head
    )
    model.roi_head.bbox_sampler.num = 4  # so that there is something to choose
    model(**batch(model), mode='loss')
    assert len(seen.outputs['head']) > 1
    assert len(seen.outputs['asked']) == 1
    assert len(seen.outputs['asked'][0][0]) == len(seen.outputs['head'][-1][0])


def test_a_mask_head_that_shares_the_extractor_does_not_change_the_rows():
    model = build_pair(CASCADE_MASK, CASCADE, roi())
    head = model.roi_head
    head.mask_roi_extractor = head.bbox_roi_extractor
    for mask_head in head.mask_head:  # the boxes' features are 7 x 7, not 14 x 14
        mask_head.roi_feat_size = (7, 7)
    for config in head.train_cfg:
        config.mask_size = 14
    extractor = head.bbox_roi_extractor[0]
    seen = Seen(
        extractor=extractor, asked=model.teacher.model.roi_head.bbox_roi_extractor[0]
    )
    model(**batch(model), mode='loss')
    given, of_masks = (args[1] for args in seen.inputs['extractor'])
    assert len(of_masks) < len(given)
    assert torch.equal(seen.inputs['asked'][0][1], given)


@pytest.mark.parametrize(
    ('more', 'rpn'), [({}, 0), (dict(type='mmdist.DenseLogits', student='rpn_head'), 1)]
)
def test_only_what_is_compared_of_the_teacher_runs_and_that_once(more, rpn):
    distill = roi() | (dict(rpn=more) if more else {})
    model = build_pair(FASTER, CASCADE_MASK, distill)
    teacher = model.teacher.model
    head = teacher.roi_head
    seen = Seen(
        backbone=teacher.backbone,
        neck=teacher.neck,
        rpn=teacher.rpn_head,
        stage0=head.bbox_head[0],
        stage1=head.bbox_head[1],
        mask0=head.mask_head[0],
    )
    losses = model(**batch(model), mode='loss')
    assert seen.calls == dict(backbone=1, neck=1, rpn=rpn, stage0=1, stage1=0, mask0=0)
    assert all(losses[f'loss_{name}'] > 0 for name in distill)


def test_the_semantic_features_of_htc_reach_its_bbox_head():
    model = build_pair(HTC, distill=roi())
    teacher = model.teacher.model
    head = teacher.roi_head
    seen = Seen(semantic=head.semantic_head, head=head.bbox_head[0])
    given = Seen(extractor=model.roi_head.bbox_roi_extractor[0])
    data = batch(model)
    model(**data, mode='loss')
    assert len(seen.outputs['semantic']) == 1

    rois = given.inputs['extractor'][0][1]
    with torch.no_grad():
        features = teacher.extract_feat(data['inputs'])
        boxes = head.bbox_roi_extractor[0](features[:4], rois)
        semantic = head.semantic_head(features)[1]
        semantic = head.semantic_roi_extractor([semantic], rois)
    expected = boxes + nn.functional.adaptive_avg_pool2d(semantic, boxes.shape[-2:])
    torch.testing.assert_close(seen.inputs['head'][0][0], expected)


def test_seesaw_loss_is_compared_by_its_probabilities():
    """Its head has C + 2 columns: C classes, and two for objectness."""
    model = build_pair(SEESAW, distill=roi(loss=EXACT))
    seen = Seen(
        student=model.roi_head.bbox_head, teacher=model.teacher.model.roi_head.bbox_head
    )
    losses = model(**batch(model), mode='loss')

    def probabilities(logits):
        classes, objectness = softmax(logits[:, :-2]), softmax(logits[:, -2:])
        return np.concatenate([classes * objectness[:, :1], objectness[:, 1:]], 1)

    student, teacher = (
        probabilities(numpy(seen.outputs[side][0][0]))
        for side in ('student', 'teacher')
    )
    assert student.shape[1] == 1203 + 1
    expected = dist(student, teacher)
    assert losses['loss_dist'].item() == pytest.approx(expected, abs=1e-4)


def test_no_proposals_give_a_loss_of_zero():
    model = build_pair(FASTER, CASCADE, roi())
    # As in an image without objects whose proposals are all ignored.
    model.roi_head.bbox_sampler.num = 0
    model.roi_head.bbox_sampler.add_gt_as_proposals = False
    losses = model(**batch(model), mode='loss')
    assert losses['loss_dist'].item() == 0
    losses['loss_dist'].backward()


@pytest.mark.parametrize(
    ('student', 'teacher', 'stage', 'message'),
    [
        (FASTER, CASCADE, 3, r'stage=3 of the teacher.*CascadeRCNN has 3'),
        (FASTER, FASTER, 1, r'stage=1 of the teacher.*FasterRCNN has 1'),
        (RETINANET, FASTER, None, r'a RetinaNet: it has no `roi_head\.bbox_roi_'),
        (FASTER, RETINANET, None, 'cannot compare a RetinaNet'),
        (SPARSE, SPARSE, None, 'a SparseRCNN.*own learned proposals.*QueryLogits comp'),
    ],
)
def test_what_has_no_such_stage_or_proposals_is_refused(
    student, teacher, stage, message
):
    with pytest.raises(ValueError, match=message):
        build_pair(student, teacher, roi(stage=stage))


@pytest.mark.slow
def test_the_one_branch_of_a_trident_teacher_is_asked_about_all_of_the_student():
    """The student trains on a copy of the batch per branch; rois index all copies."""
    sizes = ((64, 64), (64, 64))
    model = build_pair(
        TRIDENT, distill=roi(), factors=(1, 1), edit=few_proposals, sizes=sizes
    )
    seen = Seen(
        given=model.roi_head.bbox_roi_extractor,
        asked=model.teacher.model.roi_head.bbox_roi_extractor,
    )
    model(**batch(model, sizes), mode='loss')
    (given,), (asked,) = ([args[1] for args in x] for x in seen.inputs.values())
    assert set(given[:, 0].tolist()) == {0, 1, 2, 3, 4, 5}
    assert asked[:, 0].tolist() == [i % 2 for i in given[:, 0].tolist()]
    assert torch.equal(asked[:, 1:], given[:, 1:])

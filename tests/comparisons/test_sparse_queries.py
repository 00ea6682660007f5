from __future__ import annotations

import pytest
import torch
from builders import Seen
from det_zoo import batch, build_pair
from torch import nn

SPARSE = 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'
QUERYINST = 'queryinst/queryinst_r50_fpn_1x_coco.py'


def kept(comparison, name: str) -> list:
    """A list that collects what a method of the comparison returns."""
    results, step = [], getattr(comparison, name)

    def keep(*args):
        results.append(step(*args))
        return results[-1]

    setattr(comparison, name, keep)
    return results


@pytest.mark.parametrize('path', [SPARSE, QUERYINST])
def test_a_copy_of_the_student_has_the_same_queries(path):
    """The student's are recorded in its loss, the teacher's computed by mmdist."""
    # In float64: each of the six stages amplifies a difference tenfold.
    model = build_pair(path, factors=(8, 8)).double()
    # mmcv's MultiheadAttention keeps the `dropout` of those built before, as in a DETR.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    data = batch(model)
    data['inputs'] = data['inputs'].double()
    for sample in data['data_samples']:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()
    model.teacher.model.load_state_dict(model.state_dict())
    comparison = model.distill['dist']
    recorded, asked = kept(comparison, 'record'), kept(comparison, 'ask')
    model(**data, mode='loss')
    assert len(recorded[0]) == len(asked[0]) == 6
    for student, teacher in zip(recorded[0], asked[0], strict=True):
        for s, t in zip(student, teacher, strict=True):
            assert s.scores.shape == (30, 80) and s.bboxes.shape == (30, 4)
            torch.testing.assert_close(s.scores, t.scores, atol=1e-6, rtol=0)
            torch.testing.assert_close(s.bboxes, t.bboxes, atol=1e-4, rtol=0)


def test_the_last_stage_is_what_the_teacher_predicts_with():
    model = build_pair(SPARSE)
    teacher = model.teacher.model
    asked = kept(model.distill['dist'], 'ask')
    data = batch(model)
    model(**data, mode='loss')

    with torch.no_grad():
        features = teacher.extract_feat(data['inputs'])
        proposals = teacher.rpn_head.predict(features, data['data_samples'])
        teacher.roi_head.test_cfg.max_per_img = 30 * 80  # all, in no order
        results = teacher.roi_head.predict(features, proposals, data['data_samples'])
    for queries, result in zip(asked[0][-1], results, strict=True):
        scores, order = queries.scores.sigmoid().flatten().sort(descending=True)
        best = result.scores.argsort(descending=True)[:10]
        torch.testing.assert_close(result.scores[best], scores[:10])
        torch.testing.assert_close(
            result.bboxes[best], queries.bboxes[order[:10] // 80]
        )


def test_the_teachers_masks_are_not_computed():
    model = build_pair(QUERYINST)
    seen = Seen(masks=model.teacher.model.roi_head.mask_head[0])
    losses = model(**batch(model), mode='loss')
    assert seen.calls == dict(masks=0)
    assert losses['loss_dist'] > 0

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from det_zoo import batch, build_pair

SPARSE = 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'
QUERYINST = 'queryinst/queryinst_r50_fpn_1x_coco.py'


def kept(comparison, name: str) -> list:
    """What a step of the comparison will return."""
    results, step = [], getattr(comparison, name)

    def keep(*args):
        results.append(step(*args))
        return results[-1]

    setattr(comparison, name, keep)
    return results


@pytest.mark.parametrize('path', [SPARSE, QUERYINST])
def test_a_copy_of_the_student_has_the_same_queries(path):
    """Recorded in the student's loss, and asked of the teacher: two ways to one end."""
    # In a process of its own: after hundreds of other models in one process the two
    # differ by some percent, which has not been explained.
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        pool.submit(compare_copy, path).result()


def compare_copy(path):
    model = build_pair(path, factors=(8, 8))
    model.teacher.model.load_state_dict(model.state_dict())
    comparison = model.distill['dist']
    recorded, asked = kept(comparison, 'record'), kept(comparison, 'ask')
    model(**batch(model), mode='loss')
    assert len(recorded[0]) == len(asked[0]) == 6
    # The boxes of random weights leave the image, and rounding grows with each stage.
    for student, teacher in zip(recorded[0][:3], asked[0][:3], strict=True):
        for s, t in zip(student, teacher, strict=True):
            assert s.scores.shape == (30, 80) and s.bboxes.shape == (30, 4)
            torch.testing.assert_close(s.scores, t.scores, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(s.bboxes, t.bboxes, atol=0.1, rtol=1e-3)


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
    calls = []
    for head in model.teacher.model.roi_head.mask_head:
        head.register_forward_hook(lambda *args: calls.append(1))
    losses = model(**batch(model), mode='loss')
    assert not calls
    assert losses['loss_dist'] > 0

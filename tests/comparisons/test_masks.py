"""The masks of instance segmentors, proposal by proposal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import assert_learns, slow
from det_zoo import FAMILIES, batch, build_pair
from oracles import SIZES, reversed_classes, step
from scipy.special import expit

from mmdist.record import Recorder

MASK, CASCADE = 'Mask R-CNN', 'Cascade Mask R-CNN'


def pair(student: str, teacher: str | None = None, factors=(8, 4), **kwargs):
    distill = dict(mask=dict(type='mmdist.Masks', **(dict(min_score=0.0) | kwargs)))
    paths = FAMILIES[student], FAMILIES[teacher or student]
    return build_pair(*paths, distill, factors, sizes=SIZES)


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [(MASK, CASCADE), (CASCADE, MASK), *slow([(MASK, MASK), (CASCADE, CASCADE)])],
)
def test_a_student_learns_masks(student, teacher):
    model = pair(student, teacher)
    losses, pairs = step(model)
    terms = [v for k, v in losses.items() if k.startswith('loss_mask_distill')]
    terms += [v for k, v in losses.items() if k.startswith('loss_mask_s')]
    assert len(terms) == len(pairs) == (3 if student == CASCADE else 1)
    assert all(0 < term.item() < 2 for term in terms)
    assert all(p.student.shape[1] == 28 * 28 and len(p.student) for p in pairs)
    sum(terms).backward()
    assert_learns(model.backbone, model.roi_head.mask_head)


@pytest.mark.parametrize('name', [MASK, CASCADE])
def test_a_copy_of_the_student_teaches_nothing(name):
    model = pair(name, factors=(8, 8)).eval()
    model.teacher.model.load_state_dict(model.state_dict(), strict=False)
    losses, pairs = step(model)
    for one in pairs:
        torch.testing.assert_close(one.student, one.teacher)
    assert losses['mask_inter' if name == MASK else 'mask_s0_inter'] > 0.9999


def test_the_loss_is_one_minus_the_mean_correlation_of_a_mask():
    """Oracle: numpy, mask by mask."""
    losses, (one,) = step(pair(MASK))
    student, teacher = (
        expit(x.detach().numpy().astype(float)) for x in (one.student, one.teacher)
    )
    both = zip(student, teacher, strict=True)
    wanted = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in both])
    assert losses['loss_mask_distill'].item() == pytest.approx(wanted, abs=1e-4)


def test_the_mask_is_of_the_class_that_the_teacher_sees():
    """The teacher's classes are in another order; they are matched by name."""
    model = pair(MASK)
    model.teacher.classes = reversed_classes()
    head, guest = model.roi_head.mask_head, model.teacher.model.roi_head
    with Recorder([head, guest.bbox_head, guest.mask_head]) as recorder:
        _, (one,) = step(model)
    ours, scores, theirs = (
        recorder.calls(module)[-1].output
        for module in (head, guest.bbox_head, guest.mask_head)
    )
    best = scores[0][:, :-1].argmax(1)  # the last is the background
    assert len(best) == len(one.student) > 0
    for i, seen in enumerate(best):
        assert torch.equal(one.teacher[i], theirs[i, seen].flatten())
        assert torch.equal(one.student[i], ours[i, 79 - seen].flatten())


def test_what_the_teacher_is_not_sure_of_does_not_count():
    _, (one,) = step(pair(MASK, min_score=0.999))
    assert not one.mask.any()


def test_masks_of_another_size_are_resized():
    model = pair(MASK)
    for layer in model.teacher.model.roi_head.mask_roi_extractor.roi_layers:
        layer.output_size = (7, 7)
    losses, (one,) = step(model)
    assert one.teacher.shape == one.student.shape
    assert losses['loss_mask_distill'].isfinite()


@pytest.mark.parametrize('name', [MASK, CASCADE])
@pytest.mark.parametrize('number', [1, 2])
def test_images_without_labels_have_no_rows(name, number):
    model = pair(name)
    data = batch(model, SIZES)
    for sample in data['data_samples'][:number]:
        sample.set_metainfo(dict(unlabelled=True))
    losses, pairs = step(model, data)
    assert [len(p.student) > 0 for p in pairs] == [number == 1] * len(pairs)
    total = sum(v for k, v in losses.items() if k.startswith('loss_mask'))
    assert total.isfinite() and total.requires_grad


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        ('Faster R-CNN', MASK, 'it has no `roi_head.mask_head`'),
        (MASK, 'Faster R-CNN', 'FasterRCNN: it has no `roi_head.mask_head`'),
        (MASK, 'HTC', 'HybridTaskCascadeRoIHead needs more'),
    ],
)
def test_what_cannot_be_compared_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        pair(student, teacher)

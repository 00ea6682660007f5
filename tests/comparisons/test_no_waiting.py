"""Distillation adds no waits for the device, which would slow down a step on a GPU.

Counted without a GPU: operations that wait, beyond those of student and teacher alone.
"""

from __future__ import annotations

from collections import Counter

import pytest
import segmentors
import torch
from builders import Seen, Waits
from det_zoo import FAMILIES, batch, build_pair

from mmdist.losses import DISTLoss
from mmdist.losses.correlations import Settings, gpu, plain
from mmdist.teachers.classes import ClassMatch, match_classes


def as_on_a_gpu(model, monkeypatch):
    """Take the plain path of the loss; the kernels, tested below, are slow on a CPU."""
    for loss in model.distill.modules():
        if isinstance(loss, DISTLoss):
            loss.path = 'plain'
    monkeypatch.setattr(plain, 'check_teacher', lambda logits: None)


def deeplabv3():
    name = 'deeplabv3/deeplabv3_r50-d8_4xb2-40k'
    student, teacher = (segmentors.zoo_model(name, width) for width in (1 / 8, 1 / 4))
    teacher.data_preprocessor.mean = [0.0, 0.0, 0.0]  # so that inputs are renormalised
    data = segmentors.make_batch(19, (64, 64), (48, 64))
    return segmentors.distilled(student, teacher), data


def detector(name):
    def other_mean(cfg, original, factor):
        if factor == 4:
            cfg.data_preprocessor.mean = [0.0, 0.0, 0.0]

    model = build_pair(FAMILIES[name], edit=other_mean)
    return model, batch(model)


def bare_teacher(model, seen):
    """Run only the teacher's layers that compute what is compared."""
    teacher = model.teacher.model
    features = teacher.extract_feat(torch.rand(2, 3, 64, 64))
    if seen is not None:
        teacher.roi_head._bbox_forward(features, seen.inputs['extractor'][-1][1])
    elif hasattr(teacher, 'bbox_head'):
        teacher.bbox_head(features)
    else:
        teacher.decode_head(features)


@pytest.mark.parametrize(
    ('build', 'num_classes'),
    [
        (deeplabv3, 19),
        (lambda: detector('RetinaNet'), 80),
        (lambda: detector('Faster R-CNN'), 80),
    ],
    ids=['DeepLabV3', 'RetinaNet', 'Faster R-CNN'],
)
def test_a_distilled_step_waits_as_often_as_its_parts(build, num_classes, monkeypatch):
    model, data = build()
    seen = None
    if hasattr(model, 'roi_head'):
        seen = Seen(extractor=model.roi_head.bbox_roi_extractor)
    model(**data, mode='loss')  # the first step loads the teacher
    as_on_a_gpu(model, monkeypatch)
    backwards = [(i,) for i in range(num_classes)][::-1]
    model.teacher.classes = ClassMatch(None, backwards, num_classes, num_classes)
    counts = []
    for factor in (1.0, 0.0):  # at 0 the teacher does not run
        model.distill_factor = factor
        for _ in range(2):  # the first can fill caches
            torch.manual_seed(0)
            with Waits() as waits:
                losses = model(**data, mode='loss')
        assert ('dist_inter' in losses) == bool(factor)
        counts.append(waits.counts)
    with torch.no_grad(), Waits() as waits:
        bare_teacher(model, seen)
    distilled, alone = counts
    assert distilled - alone - waits.counts == Counter()


def test_classes_that_one_side_lacks_are_left_out_without_waiting():
    match = match_classes(['b'], ['a', 'b'])
    for _ in range(2):  # the first copies the column indices
        with Waits() as waits:
            match.select(torch.rand(4, 2), torch.rand(4, 3))
            match.mostly_known(torch.rand(4, 2))
    assert waits.counts == Counter()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason='losses/test_correlations_gpu.py does'
)
def test_the_kernels_of_the_loss_do_not_wait(monkeypatch):
    monkeypatch.setattr(gpu, 'raise_for_teacher', lambda finite: None)
    student, teacher = torch.randn(2, 2, 5, 6, 7).unbind()
    student.requires_grad_()
    mask = torch.rand(2, 6, 7) < 0.5
    with Waits() as waits:
        inter, intra = gpu.correlations(student, teacher, mask, Settings())
        (inter + intra).backward()
    assert waits.counts == Counter()


def test_waits_are_seen():
    x = torch.arange(4.0)
    with Waits() as waits:
        x.sum().item(), bool(x.any()), x[x > 1], x.nonzero(), torch.tensor([1.0])
        x[1:], x.clone(), x.new_zeros(3)
    assert waits.counts == {
        '_local_scalar_dense': 2, 'index': 1, 'nonzero': 1, 'lift_fresh': 1,
    }  # fmt: skip

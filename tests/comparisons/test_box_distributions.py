"""Localization distillation: the box distributions of GFL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Seen, assert_learns
from det_zoo import FAMILIES, batch, build_pair
from scipy.special import expit, log_softmax, softmax
from torch import nn

GFL = FAMILIES['GFL']
SIZES = ((128, 128), (96, 128))
DISTILL = dict(
    dist=dict(type='mmdist.DenseLogits'),
    box=dict(type='mmdist.BoxDistributions', min_score=0.3),
)


def pair(factors=(8, 4)) -> nn.Module:
    model = build_pair(GFL, GFL, DISTILL, factors, sizes=SIZES)
    for side in (model, model.teacher.model):  # initially, all scores are 0.01
        side.bbox_head.gfl_cls.bias.data.fill_(-3.0)
    return model


def test_the_loss_is_that_of_the_rows_by_hand():
    """Equations 2 and 3 of the paper, with mmdet's factor T ** 2 and its mean."""
    model = pair()
    data = batch(model, SIZES)
    seen = Seen(head=model.bbox_head)
    losses = model(**data, mode='loss')
    teacher = model.teacher.model
    with torch.no_grad():
        inputs = model.teacher.renormalize(data['inputs'], SIZES)
        scores, taught = teacher.bbox_head(teacher.extract_feat(inputs))
    expected, counted, total = 0.0, 0, 0
    ((_, student),) = seen.outputs['head']
    for s, score, t in zip(student, scores, taught, strict=True):
        score, s, t = (x.detach().double().numpy() for x in (score, s, t))
        sure = expit(score).max(1) >= 0.3
        height = sure.shape[1]
        sure[1, (np.arange(height) + 0.5) * 128 / height >= 96] = False  # padding
        rows = [
            np.stack([x[:, 17 * e : 17 * (e + 1)] for e in range(4)], 1)
            .transpose(0, 3, 4, 1, 2)[sure]
            .reshape(-1, 17)
            / 10
            for x in (s, t)
        ]
        counted, total = counted + sure.sum(), total + sure.size
        if len(rows[0]):
            p = softmax(rows[1], 1)
            divergence = p * (np.log(p) - log_softmax(rows[0], 1))
            expected += 0.25 * 100 * divergence.mean()
    assert 0 < counted < total
    assert losses['loss_box'].item() == pytest.approx(expected, rel=1e-4)
    losses['loss_box'].backward()
    assert_learns(model.backbone)


def test_a_copy_of_the_student_teaches_nothing_and_its_head_runs_once():
    model = pair((8, 8)).eval()
    model.teacher.model.load_state_dict(model.state_dict())
    seen = Seen(head=model.teacher.model.bbox_head)
    losses = model(**batch(model, SIZES), mode='loss')
    assert losses['loss_box'].item() == pytest.approx(0, abs=1e-6)
    assert seen.calls == dict(head=1)


def fewer_distances(cfg, original, factor):
    if factor == 4:
        cfg.bbox_head.reg_max = 8


@pytest.mark.parametrize(
    ('student', 'message'),
    [
        (FAMILIES['ATSS'], 'BoxDistributions cannot compare a'),
        (GFL, 'is 16 for the student and 8 for the teacher'),
    ],
)
def test_no_distributions_and_other_distances_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        build_pair(student, GFL, DISTILL, edit=fewer_distances)

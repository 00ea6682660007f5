"""The example of docs/own_comparison.md, as written, takes a training step."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from docs_blocks import blocks
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from scipy.special import expit
from scipy.stats import pearsonr

from mmdist import Comparison
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ClassMatch

DOCS = Path(__file__).parents[1] / 'docs' / 'own_comparison.md'


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's two files, in a directory on the path."""
    for block in blocks('docs/own_comparison.md', 'python'):
        (tmp_path / block.file).write_text(block.code)
    monkeypatch.syspath_prepend(tmp_path)
    init_default_scope('mmdet')
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # a line per parameter
    yield tmp_path
    MODELS.module_dict.pop('Centerness', None)
    sys.modules.pop('own_comparisons', None)


def build(example: Path):
    """The model of the page's config, at a size for a test, the teacher random."""
    config = Config.fromfile(example / 'distilled.py')
    teacher = Config.fromstring(f'_base_ = {config.model.teacher.config!r}', '.py')
    for model in (config.model.student, teacher.model):
        model.backbone.update(depth=18, base_channels=8, init_cfg=None)
        model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
        model.bbox_head.update(
            in_channels=16, feat_channels=32, stacked_convs=1, num_classes=3
        )
    assert teacher.model.backbone.depth == 18 and config.model.teacher.checkpoint
    config.model.teacher.update(
        config=teacher.model, checkpoint=None, allow_random=True
    )
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    for side in (model, model.teacher.model):  # as initialised, all score 0.01
        side.bbox_head.atss_cls.bias.data.fill_(-3.0)
        for name in ('atss_cls', 'atss_centerness'):
            getattr(side.bbox_head, name).weight.data *= 30
    return model.train()


def batch(model):
    data = demo_mm_inputs(2, [(3, 256, 256), (3, 256, 192)], num_classes=3)
    return model.data_preprocessor(data, training=True)


def test_the_example_is_complete_and_short(example):
    lines = (example / 'own_comparisons.py').read_text().splitlines()
    assert 0 < len(lines) <= 30
    assert (example / 'distilled.py').exists()


def test_its_loss_is_that_of_the_rows_by_hand(example):
    model = build(example)
    data = batch(model)
    outputs = []
    hook = model.bbox_head.register_forward_hook(lambda *a: outputs.append(a[-1]))
    losses = model(**data, mode='loss')
    hook.remove()
    sizes = [sample.img_shape for sample in data['data_samples']]
    teacher = model.teacher.model
    with torch.no_grad():
        inputs = model.teacher.renormalize(data['inputs'], sizes)
        outputs.append(teacher.bbox_head(teacher.extract_feat(inputs)))
    expected, counted, total = 0.0, 0, 0
    (_, _, student), (scores, _, taught) = outputs
    for s, score, t in zip(student, scores, taught, strict=True):
        score, s, t = (x.detach().double().numpy() for x in (score, s, t))
        sure = expit(score).max(1) > 0.05
        counted, total = counted + sure.sum(), total + sure.size
        s, t = expit(s[:, 0][sure]), expit(t[:, 0][sure])
        # a single row has no correlation with another
        expected += 1 - (pearsonr(s, t)[0] if len(s) > 1 else 0) if len(s) else 0
    assert 0 < counted < total
    assert losses['loss_centre'].item() == pytest.approx(expected, rel=1e-4)

    losses['loss_centre'].backward()
    assert model.backbone.layer4[0].downsample[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    keys = {'loss_dist', 'dist_inter', 'dist_intra', 'centre_intra'}
    assert keys <= losses.keys()


def test_a_copy_of_the_student_teaches_nothing(example):
    model = build(example)
    model.teacher.model.load_state_dict(model.state_dict())
    losses = model(**batch(model), mode='loss')
    assert losses['loss_centre'].item() == pytest.approx(0, abs=1e-6)
    assert losses['loss_dist'].item() == pytest.approx(0, abs=1e-3)


def test_another_family_is_refused(example):
    config = Config.fromfile(example / 'distilled.py')
    path = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    config.model.student = Config.fromstring(f'_base_ = {path!r}', '.py').model
    with pytest.raises(ValueError, match='Centerness cannot compare a RetinaNet'):
        MODELS.build(config.model)


def test_every_name_of_the_page_exists(example):
    model = build(example)
    data = batch(model)
    step = Step(model, model.teacher, ClassMatch(), **data)
    text = DOCS.read_text()
    names = set(re.findall(r'\bstep\.(\w+)', text))
    assert len(names) > 10
    assert names <= set(dir(step))

    methods = re.findall(r'`(\w+)\((student|teacher|step|model)[),]', text)
    assert len(methods) > 7
    assert {name for name, _ in methods} <= set(dir(Comparison))

"""The configs of docs/teachers.md, run with small models in place of the named ones."""

from __future__ import annotations

import importlib.util
import itertools
import re

import pytest
import torch
from det_zoo import batch
from docs_blocks import code, only, replace_teacher, small
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch

from mmdist.comparisons import detections
from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config

BLOCKS = code('docs/teachers.md')
CONFIGS = [block for block in BLOCKS if 'mmdist.Distiller' in block]


def title(block: str) -> str:
    return re.sub(r'\W+', '-', block)[-90:-20]


@pytest.mark.parametrize('block', CONFIGS, ids=title)
def test_config_takes_a_step(block, tmp_path, monkeypatch):
    monkeypatch.setattr(detections, 'MIN_SCORE', 0.0)
    if 'torchvision' in block:
        if importlib.util.find_spec('torchvision') is None:
            pytest.skip('torchvision is not installed')
        teacher = only(BLOCKS, 'class TorchvisionRetinaNet')
        (tmp_path / 'torchvision_teacher.py').write_text(teacher)
        monkeypatch.syspath_prepend(tmp_path)
    lines = block.strip().splitlines()
    assert len(lines) <= 15
    (tmp_path / 'config.py').write_text(block)
    config = Config.fromfile(tmp_path / 'config.py')
    scope = config.default_scope
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    names = class_names_of_config(config)
    model = config.model
    model.student = small(model.student, scope)
    for teacher in model.get('teachers', dict(a=model.get('teacher'))).values():
        replace_teacher(teacher, names, scope, tmp_path)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(model)
        model.init_weights()
    for guest in model.teachers.values():
        guest.classes = guest.match_classes(names)
        if 'cityscapes_from_ade20k' in block:  # it sees what Cityscapes has
            common = list(itertools.chain(*guest.classes.teacher))
            guest.model.decode_head.conv_seg.bias.data[common] += 5
        for module in guest.model.modules():  # random weights are sure of nothing
            if 'score_thr' in (getattr(module, 'test_cfg', None) or {}):
                module.test_cfg['score_thr'] = 0.0
    model.train()
    if scope == 'mmdet':
        data = batch(model, num_classes=len(names))
    else:
        data = make_batch(19)
    losses = model(**data, mode='loss')
    if 'ema' not in block:  # at first the teacher is the student, but for its dropout
        assert losses['loss_dist'].item() > 0
    losses['loss_dist'].backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).isfinite().all()
    assert torch.stack(norms).norm() > 0


def test_every_config_of_the_page_is_run():
    assert len(CONFIGS) == 10

"""The configs of docs/teachers.md, run with small models in place of the named ones."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
from det_zoo import batch, shrink
from hf_models import DETECTORS, SEGMENTORS, grounding_dino, save_model, tokenizer
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch, thin

from mmdist.comparisons import detections
from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config
from mmdist.teachers.teacher import load_config

PAGE = (Path(__file__).parents[1] / 'docs/teachers.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE, flags=re.S)
CONFIGS = [block for block in BLOCKS if 'mmdist.Distiller' in block]
# Of the named models, those that stand in for them, and their image processors.
STANDS_IN = {
    'nvidia/segformer-b5': (SEGMENTORS['segformer'], 'SegformerImageProcessor'),
    'facebook/mask2former': (SEGMENTORS['mask2former'], 'Mask2FormerImageProcessor'),
    'PekingU/rtdetr': (DETECTORS['rt_detr'], 'RTDetrImageProcessor'),
    'IDEA-Research/grounding-dino': (grounding_dino, 'GroundingDinoImageProcessor'),
}


def small(model: dict, scope: str) -> dict:
    if scope == 'mmdet':
        return shrink(model, 8)
    for key in ('size', 'test_cfg'):
        model.data_preprocessor.pop(key, None)
    return thin(model, 1 if 'MixVisionTransformer' in str(model) else 1 / 8)


def replace_teacher(teacher: dict, names: list[str], scope: str, folder: Path) -> None:
    """A small model for the named one, with the classes that the config expects."""
    if 'ema' in teacher:
        return
    if isinstance(teacher.config, str):
        # the ADE20K teacher's attention is slow on a CPU
        config = load_config(teacher.config.replace('b5_8xb2', 'b0_8xb2'))
        config.model = small(config.model, scope)
        teacher.update(config=config, checkpoint=None, allow_random=True)
    elif 'Torchvision' in teacher.config.type:
        teacher.config.weights = None
    else:
        (key,) = [key for key in STANDS_IN if teacher.config.name.startswith(key)]
        renamed = teacher.get('class_map', {})
        labels = {i: renamed.get(name, name) for i, name in enumerate(names)}
        make, processor = STANDS_IN[key]
        teacher.config.name = save_model(make, processor, folder / 'hf', labels)
        if 'prompts' in teacher.config:
            tokenizer(teacher.config.name, ['person', 'car', 'drone'])


def title(block: str) -> str:
    return re.sub(r'\W+', '-', block)[-90:-20]


@pytest.mark.parametrize('block', CONFIGS, ids=title)
def test_config_takes_a_step(block, tmp_path, monkeypatch):
    monkeypatch.setattr(detections, 'MIN_SCORE', 0.0)
    if 'torchvision' in block:
        if importlib.util.find_spec('torchvision') is None:
            pytest.skip('torchvision is not installed')
        (code,) = [
            b for b in BLOCKS if 'import ForeignTeacher' in b.replace('MODELS, ', '')
        ]
        (tmp_path / 'torchvision_teacher.py').write_text(code)
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

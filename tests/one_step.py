"""One step of a complete config, with small models in place of those it names."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest import mock

import torch
from builders import quiet
from det_zoo import batch, shrink
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch, thin

from mmdist.comparisons import detections
from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config
from mmdist.teachers.teacher import load_config, without_pretrained


def train_a_step(config: Config, folder: Path, full_size: bool = False) -> None:
    """Train a complete config for a step; each entry of `distill` gives a gradient.

    Args:
        config: The config; its models are changed in place.
        folder: Where models of Hugging Face can be written.
        full_size: Whether the models keep the size in the config.
    """
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    scope, names = config.default_scope, class_names_of_config(config)
    is_det = scope == 'mmdet'
    model = config.model
    if full_size:
        model = without_pretrained(model)
        model.teacher.update(checkpoint=None, allow_random=True)
        model.student.data_preprocessor.pop('size', None)
    else:
        model.student = small(model.student, scope)
        for teacher in model.get('teachers', {'': model.get('teacher')}).values():
            replace_teacher(teacher, names, scope, folder)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope), quiet():
        model = revert_sync_batchnorm(MODELS.build(model)).train()
        model.init_weights()
    model.balance = None  # balancing leaves no gradient in the first step
    for teacher in model.teachers.values():  # random models are sure of nothing
        teacher.classes = teacher.match_classes(names)
        if 'cityscapes_from_ade20k' in config.text:  # make it see Cityscapes' classes
            common = list(itertools.chain(*teacher.classes.teacher))
            teacher.model.decode_head.conv_seg.bias.data[common] += 5
        for module in teacher.model.modules():
            if 'score_thr' in (getattr(module, 'test_cfg', None) or {}):
                module.test_cfg['score_thr'] = 0.0
    for comparison in model.distill.values():
        comparison.min_score = 0.0
    # DINO picks its 900 queries from the cells, so it needs as many
    height, width = (256, 256) if full_size else (64, 64)
    if is_det:
        sizes = ((height, width), (height * 3 // 4, width))
        data = batch(model, sizes, len(names))
    else:
        data = make_batch(len(names), (height, width))
    with mock.patch.object(detections, 'MIN_SCORE', 0.0):
        losses = model(**data, mode='loss')
    for name in config.model.get('distill') or ['dist']:
        found = [v for k, v in losses.items() if k.startswith(f'loss_{name}')]
        values = [x for v in found for x in (v if isinstance(v, list) else [v])]
        model.zero_grad()
        sum(values).backward(retain_graph=True)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert torch.stack(norms).isfinite().all()
        # deep random teachers can predict the same everywhere, which leaves no gradient
        assert sum(values) > 0 if full_size else torch.stack(norms).norm() > 0


def small(model: dict, scope: str) -> dict:
    """The config of a model at a size for tests."""
    if scope == 'mmdet':
        return shrink(model, 8)
    for key in ('size', 'test_cfg'):
        model.data_preprocessor.pop(key, None)
    return thin(model, 1 if 'MixVisionTransformer' in str(model) else 1 / 8)


def replace_teacher(teacher: dict, names: list[str], scope: str, folder: Path) -> None:
    """Put a small model with the config's classes in place of the named one."""
    if 'ema' in teacher:
        return
    if isinstance(teacher.config, (str, Config)):
        config = teacher.config
        if isinstance(config, str):
            # the ADE20K teacher's attention is slow on a CPU
            config = load_config(config.replace('b5_8xb2', 'b0_8xb2'))
        config.model = small(config.model, scope)
        teacher.update(config=config, checkpoint=None, allow_random=True)
    elif 'Torchvision' in teacher.config.type:
        teacher.config.weights = None
    else:
        from hf_models import STANDS_IN, save_model, tokenizer

        (key,) = [key for key in STANDS_IN if teacher.config.name.startswith(key)]
        renamed = teacher.get('class_map', {})
        labels = {i: renamed.get(name, name) for i, name in enumerate(names)}
        make, processor = STANDS_IN[key]
        teacher.config.name = save_model(make, processor, folder / 'hf', labels)
        if 'prompts' in teacher.config:
            tokenizer(teacher.config.name, ['person', 'car', 'drone'])

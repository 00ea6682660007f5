"""The student's neck and head start from the teacher's, through `init_cfg`."""

from __future__ import annotations

import math

import torch
from det_zoo import FAMILIES, model_config
from docs_blocks import code, only
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config

from mmdist.registry import MODELS


def test_what_fits_is_the_teachers_and_the_rest_is_initialised(tmp_path):
    register_mmdet()
    teacher = MODELS.build(model_config(FAMILIES['RetinaNet']))
    teacher.init_weights()
    path = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=teacher.state_dict()), path)
    text = only(code('docs/teachers.md'), 'retinanet_r50.pth')
    options = Config.fromstring(text.replace('retinanet_r50.pth', str(path)), '.py')
    config = model_config('retinanet/retinanet_r18_fpn_1x_coco.py')
    for part in ('neck', 'bbox_head'):
        config[part]['init_cfg'] = options.student[part].init_cfg
    config['bbox_head']['num_classes'] = 7
    student = MODELS.build(config)
    student.init_weights()

    theirs = teacher.state_dict()
    ours = {k: v for k, v in student.state_dict().items() if 'backbone' not in k}
    other = {k for k, v in ours.items() if v.shape != theirs[k].shape}
    assert other == {
        *(f'neck.lateral_convs.{i}.conv.weight' for i in range(3)),
        'neck.fpn_convs.3.conv.weight',
        *('bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'),
    }
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if k not in other)
    bias = ours['bbox_head.retina_cls.bias']
    torch.testing.assert_close(bias, torch.full_like(bias, -math.log(99)))

"""The teacher's config, in every form, and what is asked of it."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdist.teachers.teacher import Teacher, load_config

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'


def test_configs_are_taken_in_every_form(tmp_path):
    by_name = load_config(RETINANET)
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {RETINANET!r}')
    for config in (path, str(path), by_name, Config.fromfile(path), by_name.model):
        assert load_config(config).model.backbone.depth == 18


def test_of_a_distillation_config_the_student_is_the_teacher(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = {RETINANET!r}\nmodel = dict(_delete_=True, type='mmdist.Distiller',"
        ' student=_base_.model, teacher=dict(config="none.py"))'
    )
    assert load_config(path).model.type == 'RetinaNet'


def test_no_checkpoint_is_an_error_unless_random_is_meant():
    with pytest.raises(ValueError, match='allow_random'):
        Teacher(RETINANET).load(nn.Linear(1, 1))


@pytest.mark.parametrize(
    'config', [RETINANET, 'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py']
)
def test_random_weights_ask_for_no_file(config, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f'{args} was asked for')

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', refuse)
    teacher = Teacher(config, allow_random=True)
    teacher.load(teacher.build())


def test_building_a_teacher_touches_no_gpu(monkeypatch):
    """The state of each GPU's generator would be read, and a context made on it."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)

    def refuse(*args):
        raise AssertionError('a GPU was touched')

    monkeypatch.setattr(torch.cuda, 'get_rng_state', refuse)
    Teacher(RETINANET).build()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match='bf16'):
        Teacher(RETINANET, dtype='int8')


@pytest.mark.slow
def test_a_compiled_teacher_computes_the_same(det_config, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(det_config)
    plain, compiled = (
        Teacher(str(path), allow_random=True, compile=option)
        for option in (False, True)
    )
    for teacher in (plain, compiled):
        teacher.load(plain.build())
    compiled.model.load_state_dict(plain.model.state_dict())
    images = torch.rand(1, 3, 64, 64)
    frames = torch._dynamo.utils.counters['frames']
    before = frames['ok']
    with plain.running(), compiled.running():
        expected, found = (t.model.extract_feat(images) for t in (plain, compiled))
    assert frames['ok'] > before  # it was compiled
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

"""Features: maps of any module, with 1x1 convolutions that train with the student."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    Seen,
    assert_learns,
    build_distiller,
    dataset_batch,
    distilled_text,
    without_dropout,
)
from det_zoo import FAMILIES, batch, model_config
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmdist.record import Recorder
from mmdist.registry import MODELS

FEATURES = dict(type='mmdist.Features')


@pytest.fixture
def student(det_config, tmp_path) -> Config:
    """A tiny RetinaNet whose FPN has 16 channels."""
    init_default_scope('mmdet')
    (tmp_path / 'student.py').write_text(det_config)
    return Config.fromfile(tmp_path / 'student.py')


@pytest.fixture
def teacher(student) -> Config:
    """The same with an FPN of 24 channels."""
    config = copy.deepcopy(student)
    config.model.neck.out_channels = 24
    config.model.bbox_head.in_channels = 24
    return config


def build(student: Config, teacher: Config | None, init: bool = True, **distill):
    teacher = dict(config=teacher, allow_random=True)
    return build_distiller(student.model, init, teacher=teacher, distill=distill)


SIZES = ((96, 128), (96, 100))  # the second is padded


def step(model, path: str = 'neck') -> tuple[dict, list]:
    """Run one loss pass; return its losses and the maps of both sides in float64."""
    data = batch(model, SIZES)
    sides = [side.get_submodule(path) for side in (model, model.teacher.model)]
    with Recorder(sides) as recorder:
        losses = model(**data, mode='loss')
    maps = [recorder.calls(side)[0].output for side in sides]
    return losses, [[x.detach().double().numpy() for x in side] for side in maps]


def test_published_mimic_is_the_mse_of_five_levels_through_1x1_convs(student, teacher):
    model = build(student, teacher, mimic=FEATURES | dict(adapt=True))
    losses, (ours, theirs) = step(model)
    assert len(ours) == len(model.distill.mimic.adapters) == 5
    expected = 0.0
    for conv, s, t in zip(model.distill.mimic.adapters, ours, theirs, strict=True):
        weight = conv.weight.detach().double().numpy()[:, :, 0, 0]
        bias = conv.bias.detach().double().numpy()
        adapted = np.einsum('oc,nchw->nohw', weight, s) + bias[:, None, None]
        expected += ((adapted - t) ** 2).mean()
    assert losses['loss_mimic'].item() == pytest.approx(expected, rel=1e-5)

    losses['loss_mimic'].backward()
    assert_learns(model.backbone, *model.distill.mimic.adapters)


def test_equal_channels_need_no_convolution(student):
    """So the state dict is the plain student's, and the loss of a copy is 0."""
    model = build(student, student, mimic=FEATURES)
    assert model.state_dict().keys() == MODELS.build(student.model).state_dict().keys()
    model.teacher.model.load_state_dict(model.state_dict())
    assert step(model)[0]['loss_mimic'].item() == pytest.approx(0, abs=1e-10)


def test_only_the_levels_that_differ_are_adapted(student, teacher):
    teacher.model.backbone.update(depth=50)
    teacher.model.neck.in_channels = [32, 64, 128, 256]
    mimic = FEATURES | dict(student='backbone')
    model = build(student, teacher, mimic=mimic)
    shapes = [tuple(conv.weight.shape[:2]) for conv in model.distill.mimic.adapters]
    assert shapes == [(32, 8), (64, 16), (128, 32), (256, 64)]
    told = FEATURES | dict(
        student='backbone', student_channels=[8, 16, 32], teacher_channels=[8, 64, 32]
    )
    adapters = build(student, teacher, init=False, mimic=told).distill.mimic.adapters
    assert [type(a) for a in adapters] == [nn.Identity, nn.Conv2d, nn.Identity]


def test_the_teachers_map_is_resized_to_the_students(student):
    """Bilinear resizing to half the size is the mean of 2 x 2 pixels."""
    mimic = FEATURES | dict(levels=[1], teacher_levels=[0], weight=0.5)
    model = build(student, student, mimic=mimic)
    losses, (ours, theirs) = step(model)
    n, c, h, w = ours[1].shape
    halved = theirs[0].reshape(n, c, h, 2, w, 2).mean((3, 5))
    expected = 0.5 * ((ours[1] - halved) ** 2).mean()
    assert losses['loss_mimic'].item() == pytest.approx(expected, rel=1e-5)


def pkd(student: np.ndarray, teacher: np.ndarray, counts: np.ndarray) -> float:
    """Half the mean squared difference of normalised channels (arXiv 2207.02039)."""

    def normalise(maps: np.ndarray) -> np.ndarray:
        channels = maps.transpose(1, 0, 2, 3)[:, counts]
        mean, std = (f(channels, axis=1, keepdims=True) for f in (np.mean, np.std))
        return (channels - mean) / std

    return ((normalise(student) - normalise(teacher)) ** 2).mean() / 2


def test_pkd_of_the_levels_of_equal_stride(student):
    """With a Faster R-CNN, whose strides are 4 to 64, as teacher. Oracle: numpy."""
    loss = dict(type='mmdist.DISTLoss', beta=0)
    mimic = FEATURES | dict(loss=loss, adapt=False, levels='stride')
    faster = dict(model=model_config(FAMILIES['Faster R-CNN'], 16))
    model = build(student, Config(faster | dict(default_scope='mmdet')), mimic=mimic)
    comparison = model.distill['mimic']
    assert comparison.levels == [0, 1, 2, 3]
    assert comparison.teacher_levels == [1, 2, 3, 4]
    assert model.state_dict().keys() == MODELS.build(student.model).state_dict().keys()
    losses, (ours, theirs) = step(model)
    expected = 0.0
    for level, stride in enumerate((8, 16, 32, 64)):
        s, t = ours[level], theirs[level + 1]
        assert s.shape == t.shape
        columns = (np.arange(s.shape[3]) + 0.5) * stride
        counts = np.ones_like(s[:, 0], dtype=bool)
        counts[1] = columns < SIZES[1][1]
        expected += pkd(s, t, counts)
    assert losses['loss_mimic'].item() == pytest.approx(expected, rel=1e-4)
    losses['loss_mimic'].backward()
    assert_learns(model.backbone)


def test_strides_without_a_common_one_are_an_error(student):
    mimic = FEATURES | dict(
        student='backbone.layer1', teacher='backbone.layer4', levels='stride'
    )
    with pytest.raises(ValueError, match=r"strides \[4\], the teacher's .* \[32\]"):
        build(student, student, mimic=mimic)
    with pytest.raises(ValueError, match="indices, or 'stride'"):
        MODELS.build(FEATURES | dict(levels='strides'))


def test_any_loss_gets_the_maps(student, teacher):
    """A custom loss gets spatial maps, and the mask of padding if it takes one."""
    seen = []

    class Spy(nn.Module):
        def forward(self, student, teacher, mask=None):
            seen.append((student.shape, mask))
            return (student - teacher).abs().mean()

    MODELS.register_module(name='SpyLoss', module=Spy, force=True)
    model = build(
        student,
        teacher,
        spy=FEATURES | dict(loss=dict(type='mmdist.SpyLoss')),
        mmdet=FEATURES | dict(loss=dict(type='mmdet.L1Loss')),
        dist=FEATURES | dict(loss=dict(type='mmdist.DISTLoss')),
    )
    losses, _ = step(model)
    shape, mask = seen[0]
    assert shape == (2, 24, 12, 16)  # stride 8 of 96 x 128
    # 100 of 128 pixels cover 12.5 of 16 cells, and the centres of 12
    assert mask[0].all() and mask[1, :, :12].all() and not mask[1, :, 12:].any()
    assert losses['loss_mmdet'].isfinite()
    assert model.distill.dist.loss.activation == 'identity'
    assert {'dist_inter', 'dist_intra'} <= losses.keys()


def test_comparisons_share_the_teachers_backbone(student, teacher):
    model = build(
        student,
        teacher,
        mimic=FEATURES,
        stages=FEATURES | dict(student='backbone'),
        tower=FEATURES | dict(student='bbox_head.cls_convs.0'),
        dist=dict(type='mmdist.DenseLogits'),
    )
    guest = model.teacher.model
    seen = Seen(backbone=guest.backbone, neck=guest.neck)
    losses = model(**batch(model, SIZES), mode='loss')
    assert seen.calls == dict(backbone=1, neck=1)
    assert {'loss_mimic', 'loss_stages', 'loss_tower', 'loss_dist'} <= losses.keys()
    assert 'extract_feat' not in vars(guest)


def test_a_module_of_the_head_is_run_by_the_teachers_own_forward(seg_config, tmp_path):
    """mmseg: the bottleneck of a PSPNet, which is in neither backbone nor neck."""
    init_default_scope('mmseg')
    (tmp_path / 'student.py').write_text(seg_config)
    config = Config.fromfile(tmp_path / 'student.py')
    mimic = FEATURES | dict(student='decode_head.bottleneck')
    model = build(config, config, mimic=mimic)
    model.teacher.model.load_state_dict(model.state_dict())
    without_dropout(model.eval())  # BN uses running statistics, as in the teacher
    data = model.data_preprocessor(dataset_batch(config), True)
    losses = model(**data, mode='loss')
    assert losses['loss_mimic'].item() == pytest.approx(0, abs=1e-10)
    losses['loss_mimic'].backward()


def test_mse_is_computed_in_fp32_under_autocast(student, teacher):
    model = build(student, teacher, mimic=FEATURES)
    seen = Seen(loss=model.distill.mimic.loss)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**batch(model, SIZES), mode='loss')
    assert [x.dtype for args in seen.inputs['loss'] for x in args] == [
        torch.float32
    ] * 10
    assert losses['loss_mimic'].dtype == torch.float32


def test_the_students_weights_do_not_depend_on_the_adapters(student, teacher):
    torch.manual_seed(0)
    plain = MODELS.build(student.model)
    plain.init_weights()
    state = build(student, teacher, mimic=FEATURES).state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key


# ---- checkpoints -------------------------------------------------------------------


def test_a_published_student_loads_strictly(student, teacher):
    """Its checkpoint has no adapters; the model keeps its own."""
    model = build(student, teacher, mimic=FEATURES)
    adapters = copy.deepcopy(model.distill.state_dict())
    plain = MODELS.build(student.model).state_dict()
    model.load_state_dict(plain, strict=True)
    load_state_dict(model, plain, strict=True)  # mmengine's own function
    for key, value in plain.items():
        assert torch.equal(model.state_dict()[key], value), key
    for key, value in adapters.items():
        assert torch.equal(model.distill.state_dict()[key], value), key


def test_half_a_set_of_adapters_is_no_plain_student(student, teacher):
    model = build(student, teacher, mimic=FEATURES)
    state = model.state_dict()
    del state['distill.mimic.adapters.3.bias']
    with pytest.raises(RuntimeError, match=r'Missing.*adapters\.3\.bias'):
        model.load_state_dict(state, strict=True)


def test_adapters_are_trained_saved_resumed_and_not_needed_to_test(
    student, teacher, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    teacher.dump('teacher.py')
    distill = "dict(mimic=dict(type='mmdist.Features'))"
    text = distilled_text('', distill, config='teacher.py', allow_random=True)
    Path('distilled.py').write_text(text)
    config = Config.fromfile('distilled.py')
    config.train_cfg.update(max_epochs=1, val_interval=10)
    config.work_dir = 'work'
    runner = Runner.from_cfg(config)
    key = 'distill.mimic.adapters.0.weight'
    before = runner.model.state_dict()[key].clone()
    runner.train()
    saved = torch.load('work/epoch_1.pth', weights_only=False)['state_dict']
    assert torch.equal(saved[key], runner.model.state_dict()[key])
    assert not torch.equal(saved[key], before)

    config.train_cfg.max_epochs = 2
    config.load_from, config.resume = 'work/epoch_1.pth', True
    runner = Runner.from_cfg(config)
    seen = []
    runner.model.register_forward_pre_hook(
        lambda model, _: seen.append(model.state_dict()[key].clone())
    )
    runner.train()
    assert torch.equal(seen[0], saved[key])
    assert not torch.equal(seen[-1], saved[key])

    Path('teacher.py').unlink()
    model = MODELS.build(config.model)
    assert not [k for k in model.state_dict() if k.startswith('distill.')]
    model.load_state_dict(saved, strict=True)
    data = batch(model, sizes=((96, 128),) * 2)
    assert len(model.eval()(**data, mode='predict')) == 2
    with pytest.raises(FileNotFoundError):  # training does need it
        model.train()(**data, mode='loss')


# ---- errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(student='nek'), r"student, RetinaNet.*no module 'nek'.*mean 'neck'\?"),
        (dict(teacher='backbone.layer5'), r'teacher, RetinaNet.*backbone\.layer4'),
        (dict(student='zzz'), 'top-level modules: .*backbone, neck, bbox_head'),
        (dict(levels=[0, 5]), r'`levels` are \[0, 5\].*5 map\(s\), 0 to 4'),
        (dict(levels=[0], teacher_levels=[0, 1]), r'1 map\(s\).*with 2'),
        (dict(teacher_channels=[24, 24]), r'5 map\(s\).*with 2'),
    ],
)
def test_mistakes_stop_at_build_time(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        build(student, teacher, init=False, mimic=FEATURES | options)


@pytest.mark.parametrize(
    ('options', 'at_load', 'message'),
    [
        (dict(adapt=False, teacher='nek'), True, "teacher.*mean 'neck'"),
        (dict(student='bbox_head.cls_convs'), True, '(?s)not run.*`adapt=False`'),
        (dict(adapt=False), False, r'map 0 .*16 channels.*24'),
    ],
)
def test_others_when_the_teacher_is_loaded_or_asked(
    student, teacher, options, at_load, message
):
    mimic = FEATURES | options
    model = build(student, teacher, init=not at_load, mimic=mimic)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.init_weights() if at_load else model(**batch(model), mode='loss')


def test_tokens_are_no_maps():
    init_default_scope('mmdet')
    config = Config(dict(model=model_config(FAMILIES['DETR'])))
    with pytest.raises(ValueError, match=r'compares maps.*`encoder` returned'):
        build(config, config, init=False, mimic=FEATURES | dict(student='encoder'))

"""The teacher's config in every form, and mistakes in it."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import build_distiller, dataset_batch
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdist.registry import MODELS
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


def test_a_data_preprocessor_of_the_config_is_the_models(det_config, tmp_path):
    """As in the Runner; without it, the teacher would see raw pixels."""
    path = tmp_path / 'config.py'
    path.write_text(det_config)
    plain = Config.fromfile(path)
    moved = Config.fromfile(path)
    moved.data_preprocessor = moved.model.pop('data_preprocessor')
    assert load_config(moved).model == plain.model
    moved.model = dict(type='mmdist.Distiller', student=moved.model, teacher={})
    assert load_config(moved).model == plain.model


def test_copies_of_a_student_share_no_teacher(det_config, tmp_path):
    """They can be cast, moved and trained; training loads their own teacher."""
    path = tmp_path / 'config.py'
    path.write_text(det_config)
    config = Config.fromfile(path)
    teacher = dict(config=str(path), checkpoint=str(tmp_path / 'a.pth'))
    weights = Teacher(str(path)).build().state_dict()
    torch.save(dict(state_dict=weights), teacher['checkpoint'])
    model = build_distiller(config.model, teacher=teacher)
    batch = model.data_preprocessor(dataset_batch(config), True)
    expected = model(**copy.deepcopy(batch), mode='loss')['loss_dist']
    for other in (copy.deepcopy(model), ExponentialMovingAverage(model).module):
        assert other.teacher.model is None
        other.half().to('meta')
    for name, weight in model.teacher.model.state_dict().items():
        assert (
            torch.equal(weight, weights[name]) and weight.dtype == weights[name].dtype
        )
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch, mode='loss')['loss_dist'], expected)
    assert other.teacher.model is not model.teacher.model
    double = copy.deepcopy(model).double()
    double.teacher.load(double)
    assert next(double.teacher.model.parameters()).dtype == torch.float64


# ---- mistakes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(teacher=dict(config='a.py', chekpoint='a.pth')),
            "`teacher`: unknown argument 'chekpoint'. Did you mean 'checkpoint'? It "
            'takes config, checkpoint, allow_random, ',
        ),
        (dict(teacher=dict(checkpoint='a.pth')), "`teacher`: .* 'config' is missing"),
        (dict(teacher='a.py'), "`teacher` must be a dict of arguments, got 'a.py'"),
        (
            dict(teachers=dict(a=dict(config='a.py', view=['flip']))),
            "`teachers.a`: unknown argument 'view'. Did you mean 'views'?",
        ),
    ],
)
def test_misspelt_arguments_name_what_there_is(options, message, det_config):
    student = Config.fromstring(det_config, '.py').model
    with pytest.raises(ValueError, match=message.replace('?', r'\?')):
        MODELS.build(dict(type='mmdist.Distiller', student=student, **options))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (
            'mmdet::retinanet/retinanet_r18_fpn_1x_coc.py',
            r"no 'retinanet_r18_.*_coc.py' in .*; similar: retinanet_r18_fpn_1x_coco",
        ),
        ('mmdet::retinanets/a.py', r"no 'retinanets' in .*; similar: retinanet[,.]"),
        ('nolib::a/b.py', "'nolib' is not installed"),
        ('configs::a.py', "'configs' is not installed"),  # a folder
        (
            'configs/stuednt.py',
            r"no 'stuednt.py' in .*configs; similar: student.py. Relative paths "
            r"count from the working directory, .* path with '{{ fileDirname }}/'",
        ),
    ],
)
def test_a_config_that_does_not_exist_is_named_with_similar_ones(
    config, message, tmp_path, monkeypatch
):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/student.py').touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as error:
        Teacher(config, 'a.pth').load(nn.Linear(1, 1))
    assert str(error.value).startswith(f'`teacher.config` is {config!r}, but ')
    assert len(str(error.value)) < 600 and error.value.__context__ is None


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (5, r'`teacher\.config` must be the path of a config, .* got 5'),
        (None, r'`teacher\.config` must be the path of a config, .* got None'),
        (dict(model='a.py'), r'`teacher\.config` has no `model`, which must be a dict'),
        ('hello.py', "is 'hello.py', which cannot be read: NameError: .*'hello'"),
        ('lr.py', 'has no `model`'),
        (dict(type='mmdist.HFSegmenter'), "Did you mean 'mmdist.HFSegmentor'"),
        (dict(type='mmdet.RetinaNett'), "Did you mean 'RetinaNet'"),
        (dict(name='a'), 'No model is called None'),
    ],
)
def test_what_is_no_config_is_refused(config, message, tmp_path, monkeypatch):
    (tmp_path / 'hello.py').write_text('hello')
    (tmp_path / 'lr.py').write_text('lr = 1')
    monkeypatch.chdir(tmp_path)
    with (
        DefaultScope.overwrite_default_scope('mmdet'),
        pytest.raises(ValueError, match=message),
    ):
        Teacher(config, allow_random=True).load(nn.Linear(1, 1))


def test_no_weights_and_an_unknown_dtype_are_refused():
    with pytest.raises(ValueError, match='allow_random'):
        Teacher(RETINANET).load(nn.Linear(1, 1))
    with pytest.raises(ValueError, match='bf16'):
        Teacher(RETINANET, dtype='int8')


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
    """Reading the state of a GPU's generator would create a context on it."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)

    def refuse(*args):
        raise AssertionError('a GPU was touched')

    monkeypatch.setattr(torch.cuda, 'get_rng_state', refuse)
    Teacher(RETINANET).build()


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

"""The student's own mean as its teacher: closed form, checkpoint, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import dataset_batch, distilled_text
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmdist.checkpoint import load_checkpoint

MOMENTUM = 0.75


@HOOKS.register_module()
class KeepStudent(Hook):
    """What the student's parameters are before each step, in float64."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.seen.append(
            {
                name: parameter.detach().double().numpy().copy()
                for name, parameter in runner.model.named_parameters()
            }
        )


def make_config(text: str, folder: Path, **options) -> Config:
    (folder / 'student.py').write_text(text)
    (folder / 'distilled.py').write_text(distilled_text(ema=dict(momentum=MOMENTUM)))
    config = Config.fromfile(folder / 'distilled.py')
    config.work_dir = str(folder / 'work')
    config.optim_wrapper.optimizer.lr = 0.05
    config.merge_from_dict(options)
    return config


def train(config: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    return runner


@pytest.fixture
def config(seg_config, tmp_path) -> Config:
    return make_config(
        seg_config,
        tmp_path,
        **{
            'train_cfg.max_iters': 5,
            'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.interval': 3,
        },
    )


def test_it_is_the_mean_of_the_student_in_closed_form(config):
    config.custom_hooks = [dict(type='KeepStudent')]
    runner = train(config)
    hook = next(h for h in runner.hooks if isinstance(h, KeepStudent))
    assert len(hook.seen) == 5
    teacher = runner.model.teacher.model
    for name, parameter in teacher.named_parameters():
        first, *later = [seen[name] for seen in hook.seen]
        expected = MOMENTUM ** len(later) * first
        for age, value in enumerate(reversed(later)):
            expected = expected + (1 - MOMENTUM) * MOMENTUM**age * value
        np.testing.assert_allclose(parameter, expected, rtol=1e-4, atol=1e-6)
        assert not parameter.requires_grad
    assert not any(module.training for module in teacher.modules())
    moved = (
        teacher.decode_head.conv_seg.weight.numpy()
        - hook.seen[0]['decode_head.conv_seg.weight']
    )
    assert abs(moved).max() > 1e-4


def test_the_checkpoint_is_the_plain_students(config):
    runner = train(config)
    plain = MODELS.build(config.model.student)
    assert runner.model.state_dict().keys() == plain.state_dict().keys()
    of_model = {name for name, _ in runner.model.named_parameters()}
    assert of_model == {name for name, _ in plain.named_parameters()}
    saved = load_checkpoint(str(Path(config.work_dir) / 'iter_3.pth'))
    assert saved['state_dict'].keys() == plain.state_dict().keys()


@pytest.mark.parametrize('family', ['seg', 'det'])
def test_a_resumed_run_goes_on_with_the_same_teacher(family, request, tmp_path):
    """To the bit, by iterations and by epochs."""
    half, whole = {'seg': (3, 6), 'det': (1, 2)}[family]
    unit = {'seg': 'iters', 'det': 'epochs'}[family]
    text = request.getfixturevalue(f'{family}_config')
    config = make_config(
        text,
        tmp_path,
        **{
            f'train_cfg.max_{unit}': whole,
            'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.interval': half,
            'custom_hooks': [dict(type='mmdist.IterSeedHook')],
            # a worker draws its random numbers anew when data are skipped
            'train_dataloader.num_workers': 1,
        },
    )
    expected = train(config)
    resumed = copy.deepcopy(config)
    resumed.load_from = str(
        Path(config.work_dir) / f'{"iter" if unit == "iters" else "epoch"}_{half}.pth'
    )
    resumed.resume = True
    resumed.work_dir = str(tmp_path / 'resumed')
    found = train(resumed)
    for side in (
        lambda runner: runner.model,
        lambda runner: runner.model.teacher.model,
    ):
        ours, theirs = side(found).state_dict(), side(expected).state_dict()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_two_models_in_one_process_have_a_mean_each(config):
    init_default_scope('mmseg')
    torch.manual_seed(0)
    data = dataset_batch(config)
    models = []
    for _ in range(2):
        model = MODELS.build(config.model)
        model.init_weights()
        batch = model.data_preprocessor(copy.deepcopy(data), True)
        model(**batch, mode='loss')
        models.append(model)
    for model in models:
        assert torch.equal(
            model.teacher.model.decode_head.conv_seg.weight,
            model.decode_head.conv_seg.weight,
        )


def test_it_moves_on_while_distillation_rests(config):
    """So that a ramp begins with a mean, not with the first student."""
    init_default_scope('mmseg')
    model = MODELS.build(config.model)
    model.init_weights()
    model.distill_factor = 0.0
    batch = model.data_preprocessor(dataset_batch(config), True)
    for weight in (1.0, 3.0):
        model.decode_head.conv_seg.weight.data.fill_(weight)
        model(**copy.deepcopy(batch), mode='loss')
    mean = model.teacher.model.decode_head.conv_seg.weight
    torch.testing.assert_close(mean, torch.full_like(mean, 0.75 * 1 + 0.25 * 3))


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        (dict(ema=dict(momentum=1.0)), 'between 0 and 1, got 1.0'),
        (
            dict(ema={}, checkpoint='a.pth'),
            r"takes nothing but .* got \['checkpoint'\]",
        ),
    ],
)
def test_mistakes_stop_when_the_model_is_built(config, teacher, message):
    init_default_scope('mmseg')
    config.model.teacher = teacher
    with pytest.raises(ValueError, match=message):
        MODELS.build(config.model)

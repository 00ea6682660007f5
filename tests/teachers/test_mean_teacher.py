"""The running mean of the student as its teacher: closed form, checkpoint, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import dataset_batch, distilled_config, slow
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmdist.checkpoint import load_checkpoint

MOMENTUM = 0.75


@HOOKS.register_module()
class KeepStudent(Hook):
    """Keeps the student's parameters before each step, in float64."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        parameters = runner.model.named_parameters()
        self.seen.append({k: p.detach().double().numpy() for k, p in parameters})


def make_config(text: str, folder: Path, **options) -> Config:
    config = distilled_config(folder, text, ema=dict(momentum=MOMENTUM))
    config.work_dir = str(folder / 'work')
    config.optim_wrapper.optimizer.lr = 0.05
    config.merge_from_dict(options)
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    return config


def train(config: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    return runner


@pytest.fixture
def config(seg_config, tmp_path) -> Config:
    options = {'train_cfg.max_iters': 5, 'default_hooks.checkpoint.interval': 3}
    return make_config(seg_config, tmp_path, **options)


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
    name = 'decode_head.conv_seg.weight'
    moved = teacher.get_parameter(name).numpy() - hook.seen[0][name]
    assert abs(moved).max() > 1e-4

    # the checkpoint is the plain student's
    plain = MODELS.build(config.model.student)
    assert runner.model.state_dict().keys() == plain.state_dict().keys()
    of_model = {name for name, _ in runner.model.named_parameters()}
    assert of_model == {name for name, _ in plain.named_parameters()}
    saved = load_checkpoint(str(Path(config.work_dir) / 'iter_3.pth'))
    assert saved['state_dict'].keys() == plain.state_dict().keys()


@pytest.mark.parametrize('family', ['seg', *slow(['det'])])
def test_a_resumed_run_goes_on_with_the_same_teacher(family, request, tmp_path):
    half, whole = {'seg': (3, 6), 'det': (1, 2)}[family]
    unit = {'seg': 'iters', 'det': 'epochs'}[family]
    text = request.getfixturevalue(f'{family}_config')
    options = {
        f'train_cfg.max_{unit}': whole,
        'default_hooks.checkpoint.interval': half,
        'custom_hooks': [dict(type='mmdist.IterSeedHook')],
        # a worker repeats its random draws when data are skipped
        'train_dataloader.num_workers': 1,
    }
    config = make_config(text, tmp_path, **options)
    expected = train(config)
    resumed = copy.deepcopy(config)
    resumed.load_from = str(Path(config.work_dir) / f'{unit[:-1]}_{half}.pth')
    resumed.resume = True
    resumed.work_dir = str(tmp_path / 'resumed')
    found = train(resumed)
    ours, theirs = (
        [*m.state_dict().values(), *m.teacher.model.state_dict().values()]
        for m in (found.model, expected.model)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Stepper:
    """A model trained by hand: each step adds 2 to the bias of its last layer."""

    def __init__(self, model, data: dict) -> None:
        self.model, self.data = model, data
        self.optimizer = torch.optim.SGD(model.parameters(), 1.0)

    def loss(self) -> None:
        self.model(**copy.deepcopy(self.data), mode='loss')

    def step(self, gradient: float = -2.0) -> None:
        """Step as AMP does, which skips gradients that are not finite."""
        bias = self.model.decode_head.conv_seg.bias
        bias.grad = torch.full_like(bias, gradient)
        scaler = torch.amp.GradScaler('cpu', init_scale=1.0)
        scaler.scale(torch.zeros(1))
        scaler.step(self.optimizer)

    @property
    def mean(self) -> float:
        """The teacher's value of that bias, which starts at 0."""
        (value,) = self.model.teacher.model.decode_head.conv_seg.bias.unique().tolist()
        return value


@pytest.fixture
def stepper(config):
    init_default_scope('mmseg')
    raw = dataset_batch(config)

    def make(**overrides) -> Stepper:
        torch.manual_seed(0)
        model = MODELS.build({**config.model, **overrides})
        model.init_weights()
        return Stepper(model, model.data_preprocessor(copy.deepcopy(raw), True))

    return make


@pytest.mark.parametrize('factor', [0.0, 1.0])
def test_it_moves_on_with_each_step_of_the_optimizer(stepper, factor):
    """Not with each forward, as gradients accumulate or overflow; also while paused."""
    one, other = stepper(), stepper()
    one.model.distill_factor = factor
    for expected in (0.0, 0.25 * 2, 0.75 * 0.5 + 0.25 * 4):
        for _ in range(2):
            one.loss()
            assert one.mean == expected
            other.step()  # of another model's optimizer
            one.step(float('inf'))
        with torch.no_grad():
            one.loss()
        one.step()


def test_each_model_in_a_process_has_a_mean_of_its_own(stepper):
    one, two = stepper(), stepper()
    for _ in range(2):
        one.loss(), two.loss()
        one.step()
    copied = copy.deepcopy(one.model)
    assert copied.teacher.model is None  # saves memory, and an EMA copy needs none
    copied = Stepper(copied, one.data)
    for _ in range(3):
        copied.loss(), two.loss()
        copied.step()
    one.loss()
    assert (one.mean, two.mean) == (0.75 * 0.5 + 0.25 * 4, 0.0)
    # 4 at first, then 6, then 8
    assert copied.mean == 0.75 * (0.75 * 4 + 0.25 * 6) + 0.25 * 8


def test_it_sees_the_students_images(stepper, config):
    """The Runner gives a data_preprocessor to a model that has none."""
    student = copy.deepcopy(config.model.student)
    preprocessor = student.pop('data_preprocessor')
    trained = stepper(student=student, data_preprocessor=preprocessor)
    trained.loss()
    inputs = trained.data['inputs']
    assert trained.model.teacher.renormalize(inputs, [(96, 128)] * 2) is inputs
    guest = trained.model.teacher.model
    assert torch.equal(
        guest.data_preprocessor.mean, trained.model.data_preprocessor.mean
    )
    for ours, theirs in zip(trained.model.buffers(), guest.buffers(), strict=False):
        assert ours.shape == theirs.shape


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        (dict(ema=dict(momentum=1.0)), 'between 0 and 1, got 1.0'),
        (dict(ema=dict(momentum='0.9')), "'momentum' must be a number, got '0.9'"),
        (dict(ema={}, checkpoint='a'), r"only with `views`, got \['checkpoint'\]"),
        (dict(ema=dict(momentun=0.9)), "`teacher.ema`: .*'momentun'.*'momentum'"),
        (dict(ema=0.9), '`teacher.ema` must be a dict of arguments, got 0.9'),
    ],
)
def test_mistakes_stop_when_the_model_is_built(config, teacher, message):
    init_default_scope('mmseg')
    config.model.teacher = teacher
    with pytest.raises(ValueError, match=message):
        MODELS.build(config.model)

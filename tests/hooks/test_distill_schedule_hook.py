"""The schedule through the real Runner: the weight, and when the teacher runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import distilled_config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdist.hooks import DistillScheduleHook


def test_the_factor_is_linear_between_the_points_and_zero_after_the_stop():
    hook = DistillScheduleHook(points=[(2, 0.5), (6, 1.0)], stop=8)
    factors = [hook.factor_at(t) for t in (0, 2, 3, 6, 7.9, 8, 100)]
    np.testing.assert_allclose(factors, [0.5, 0.5, 0.625, 1, 1, 0, 0])


@HOOKS.register_module()
class _WatchHook(Hook):
    """Notes, for each iteration, the loss, whether the teacher ran, and the log."""

    def __init__(self) -> None:
        self.seen = []

    def before_train(self, runner) -> None:
        self.calls = []
        runner.model.teacher.model.backbone.register_forward_hook(
            lambda *_: self.calls.append(1)
        )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        logged = set(runner.message_hub.log_scalars)
        self.seen.append((outputs.get('loss_dist'), len(self.calls), logged))
        self.calls.clear()


@pytest.mark.parametrize(
    ('schedule', 'factors'),
    [
        (dict(points=[(0, 0.0), (2, 1.0)]), [0, 0.5, 1, 1]),
        (dict(points=[(0, 0.0), (4, 1.0)], stop=3), [0, 0.25, 0.5, 0]),
        (dict(stop=1, by_epoch=True), [1, 1, 0, 0]),
    ],
)
def test_the_runner_follows_the_schedule(det_config, tmp_path, schedule, factors):
    cfg = distilled_config(tmp_path, det_config)
    cfg.work_dir = str(tmp_path)
    cfg.optim_wrapper.optimizer.lr = 0.0  # the loss changes by the factor alone
    cfg.train_dataloader.sampler.shuffle = False
    cfg.train_dataloader.dataset.pipeline[2].prob = 0.0
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    cfg.custom_hooks = [
        dict(type='mmdist.DistillScheduleHook', **schedule),
        dict(type='_WatchHook'),
    ]
    runner = Runner.from_cfg(cfg)
    runner.train()
    (watch,) = (hook for hook in runner.hooks if isinstance(hook, _WatchHook))
    full = {}  # each of the two batches has its own loss at factor 1
    seen = zip(factors, watch.seen, strict=True)
    for i, (factor, (loss, calls, logged)) in enumerate(seen):
        for name in ('loss_dist', 'dist_inter', 'dist_intra'):
            assert (f'train/{name}' in logged) == (factor > 0)
        assert 'train/loss_cls' in logged
        assert calls == (factor > 0)
        assert (loss is None) == (factor == 0)
        if factor:
            full.setdefault(i % 2, []).append(float(loss) / factor)
    for values in full.values():
        torch.testing.assert_close(values, values[:1] * len(values), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    'schedule',
    [
        dict(points=[(100, 0.0), (300, 1.0)]),
        dict(points=[(2, 0.0), (3, 1.0)], by_epoch=True),
        dict(stop=0),
    ],
)
def test_a_schedule_that_never_distils_is_refused(det_config, tmp_path, schedule):
    """The training has two epochs of two iterations."""
    cfg = Config.fromstring(det_config, '.py')
    cfg.work_dir = str(tmp_path)
    teacher = dict(config=cfg.model, allow_random=True)
    cfg.model = dict(type='mmdist.Distiller', student=cfg.model, teacher=teacher)
    cfg.custom_hooks = [dict(type='mmdist.DistillScheduleHook', **schedule)]
    with pytest.raises(ValueError, match='Nothing would be distilled'):
        Runner.from_cfg(cfg).train()


def test_it_refuses_a_model_that_is_not_distilled(det_config, tmp_path):
    cfg = Config.fromstring(det_config, '.py')
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks = [dict(type='mmdist.DistillScheduleHook')]
    with pytest.raises(TypeError, match=r'type `mmdist\.Distiller`, but'):
        Runner.from_cfg(cfg).train()

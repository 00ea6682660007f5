"""Strategies of mmengine's FlexibleRunner: they distil or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import slow
from mmengine._strategy import SingleDeviceStrategy
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, STRATEGIES, init_default_scope
from watch import Unlabel, student, watched

# Both wrappers are put on CPUs; mmengine's default is a GPU.
STRATEGIES_OF_TWO = dict(
    ddp=dict(
        type='DDPStrategy',
        model_wrapper=dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
        ),
    ),
    fsdp=dict(
        type='FSDPStrategy',
        model_wrapper=dict(
            type='MMFullyShardedDataParallel', use_orig_params=True, device_id='cpu'
        ),
    ),
)


def train(cfg: Config, unlabelled: bool) -> dict:
    runner = RUNNERS.build(cfg)
    if unlabelled:
        runner.register_hook(Unlabel())
    runner.train()
    watch = watched(runner)
    model = student(runner)
    return dict(
        runner=type(runner).__name__,
        wrapper=type(runner.model).__name__,
        losses=watch.losses,
        held=sum(p.numel() for p in runner.model.parameters()),
        teacher=sum(p.numel() for p in model.teacher.model.parameters()),
    )


@pytest.mark.slow
@pytest.mark.parametrize('unlabelled', [False, True])
def test_sharded_training_is_that_of_ddp(pair, make_config, tmp_path, unlabelled):
    """FSDP in two processes over gloo, also with different mixes of labels; 30 s."""
    results = {}
    for name, strategy in STRATEGIES_OF_TWO.items():
        cfg = make_config(
            'seg', tmp_path / name, launcher='pytorch', runner_type='FlexibleRunner',
            strategy=strategy,
        )  # fmt: skip
        results[name] = pair(train, cfg, unlabelled)
        assert {x['runner'] for x in results[name]} == {'FlexibleRunner'}
    assert results['fsdp'][0]['wrapper'] == 'MMFullyShardedDataParallel'
    for ddp, fsdp in zip(results['ddp'], results['fsdp'], strict=True):
        assert ddp['losses'].keys() == fsdp['losses'].keys()
        for i, losses in ddp['losses'].items():
            assert fsdp['losses'][i] == pytest.approx(losses, rel=1e-4, abs=1e-5)
            assert losses['loss_dist'] > 0
        assert fsdp['teacher'] == ddp['held']  # here it is as large as the student
    # Each process holds a part of the student, and a whole teacher apart from it.
    assert sum(x['held'] for x in results['fsdp']) == results['ddp'][0]['held']
    assert all(x['held'] < results['ddp'][0]['held'] for x in results['fsdp'])
    shards = Path(tmp_path / 'fsdp' / 'iter_4.pth').iterdir()
    assert sorted(path.name for path in shards) == ['rank0.pth', 'rank1.pth']


@pytest.mark.parametrize('name', ['DeepSpeedStrategy', *slow(['ColossalAIStrategy'])])
def test_other_engines_are_refused(make_config, tmp_path, monkeypatch, name):
    """Before the first step. They are not installed, so a stand-in replaces them."""

    def stand_in(train_micro_batch_size_per_gpu=None, **kwargs):
        return SingleDeviceStrategy(**kwargs)

    monkeypatch.setitem(STRATEGIES.module_dict, name, stand_in)
    cfg = make_config(
        'seg', tmp_path, runner_type='FlexibleRunner', strategy=dict(type=name)
    )
    runner = RUNNERS.build(cfg)
    with pytest.raises(NotImplementedError, match=rf'`{name}`.* `FSDPStrategy`'):
        runner.train()
    watch = watched(runner)
    assert not watch.losses


def test_the_teacher_follows_the_batch(make_config, tmp_path):
    """FSDP moves the student without ``_apply``, which would leave the teacher behind.

    The meta device stands in for a GPU; the student's own loss fails on it.
    """
    cfg = make_config('seg', tmp_path)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    model.init_weights()
    with pytest.raises(RuntimeError, match='expected device meta'):
        model.loss(torch.empty(2, 3, 96, 128, device='meta'), [])
    assert {p.device.type for p in model.teacher.model.parameters()} == {'meta'}

"""What is watched during training: losses that are not finite, rows that count."""

from __future__ import annotations

import math

import pytest
import torch
from builders import Waits, distilled_config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmdist.comparisons import Pair
from mmdist.run import Watch


@pytest.mark.parametrize('broken', ['backbone.stem.0', 'auxiliary_head.conv_seg'])
def test_a_loss_that_is_not_finite_ends_the_training(seg_config, tmp_path, broken):
    """Without a hook, so that it also stops the libraries' own train.py."""
    init_default_scope('mmseg')
    cfg = distilled_config(tmp_path, seg_config)
    cfg.work_dir, cfg.train_cfg.max_iters = str(tmp_path / 'work'), 6
    cfg.default_hooks.checkpoint.interval = 1
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    runner, calls = Runner.from_cfg(cfg), []

    def spoil(module, args, output):
        calls.append(1)
        return output * math.nan if len(calls) == 4 else output

    runner.model.get_submodule(broken).register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match='NaN or infinite in iteration 4') as error:
        runner.train()
    assert runner.iter == 3
    text = str(error.value)
    good = tmp_path / 'work' / 'iter_2.pth'
    assert f'The last checkpoint before it is {good}.' in text
    terms = text.split(' became')[0].split('stopped: ')[1].split(' and ')
    own = ['aux.loss_ce', 'decode.loss_ce'] if 'back' in broken else ['aux.loss_ce']
    assert [term for term in terms if 'dist' not in term] == own


def test_losses_are_read_every_50_steps(monkeypatch):
    """The error names the iteration. Several processes stand in for a GPU."""
    monkeypatch.setattr('mmdist.run.is_distributed', lambda: True)
    monkeypatch.setattr('mmdist.run.told', lambda key, default=None: default)
    watch = Watch()
    for step in range(1, 51):
        # a loss that is finite again, as after a step that GradScaler skips, is fine
        value = math.inf if step == 10 or step >= 42 else 1.0
        losses = dict(loss_a=[torch.ones(2), torch.tensor(value)], acc=torch.tensor(1))
        losses['loss_b'] = torch.tensor(math.nan if step > 45 else 0.0)
        if step == 50:
            with pytest.raises(RuntimeError, match=r'loss_a became .* iteration 42'):
                watch.losses(losses)
        else:
            with Waits() as waits:
                watch.losses(losses)
            assert not waits.counts['_local_scalar_dense']


def test_a_comparison_in_which_no_row_counts_is_said_once(monkeypatch):
    lines = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handle', lambda record: lines.append(record.msg))
    watch, x = Watch(), torch.rand(4, 3)
    none = torch.zeros(4, dtype=torch.bool)
    for step in range(150):
        pairs = dict(
            all=[Pair(x, x)],
            masked=[Pair(x, x, none)],
            empty=[Pair(x[:0], x[:0])],
            unweighted=[Pair(x, x, row_weight=torch.zeros(4))],
            one_of_two=[Pair(x, x, none), Pair(x, x, ~none)],
            once=[Pair(x, x, ~none if step == 30 else none)],
        )
        watch.rows(pairs if step < 50 else dict(masked=pairs['masked']))
    said = [line.split('`')[1] for line in lines if 'no row of' in str(line)]
    assert sorted(said) == ['distill.empty', 'distill.masked', 'distill.unweighted']

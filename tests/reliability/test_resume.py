"""A run that is killed and resumed equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from processes import in_process
from watch import WatchHook, student, watched

from mmdist.work_dir import last_whole_checkpoint

# augmentation in a worker, which repeats its random draws when data are skipped
OPTIONS = {
    'custom_hooks': [
        dict(type='WatchHook'),
        dict(type='mmdist.IterSeedHook'),
        dict(type='mmdist.DistillScheduleHook', points=[(0, 0.2), (8, 1.0)]),
    ],
    'model.distill': dict(
        mimic=dict(type='mmdist.Features', student='backbone', adapt=True)
    ),
    'train_dataloader.num_workers': 1,
    'param_scheduler': [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=8)],
}


def train(cfg: Config, kill_at: int | None = None, while_saving: bool = False) -> dict:
    """Train; die in iteration ``kill_at`` if it is given."""

    def die(runner, _) -> None:
        if runner.iter != kill_at:
            return
        if not while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        # the hook is called before the checkpoint of this iteration is written
        put = mmengine_checkpoint.get_file_backend

        def cut_off(path, *args, **kwargs):
            backend = put(path, *args, **kwargs)

            def put_half(content, path):
                with open(path, 'wb') as file:
                    file.write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            backend.put = put_half
            return backend

        mmengine_checkpoint.get_file_backend = cut_off

    WatchHook.after = die
    runner = Runner.from_cfg(cfg)
    runner.train()
    watch = watched(runner)
    model = student(runner)
    return dict(
        losses=watch.losses,
        weights={k: v.clone() for k, v in model.state_dict().items()},
    )


PLAIN = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
SCHEDULES = dict(
    # checkpoints every 2 iterations, killed in iteration 5 (from 0): resumes from 4
    seg=({'train_cfg.max_iters': 7, 'train_cfg.val_interval': 100}, 5, 4),
    # 2 iterations per epoch, killed in the third epoch: resumes from its beginning
    det=(
        {'train_cfg.max_epochs': 4, 'train_dataloader.persistent_workers': False},
        5,
        4,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['seg', 'det'])
def test_a_killed_run_is_resumed_to_the_bit(make_config, tmp_path, family):
    """SIGKILL within an iteration; by iterations (seg) and by epochs (det)."""
    options, kill_at, resumed_at = SCHEDULES[family]
    if family == 'seg' and hasattr(InfiniteSampler, 'skip'):
        # The onedl fork skips seen data without reading it, so a worker does not repeat
        # its random draws; without augmentation there are none.
        options = dict(options, **{'train_dataloader.dataset.pipeline': PLAIN})
    whole = make_config(family, tmp_path / 'whole', **OPTIONS, **options)
    cut = make_config(family, tmp_path / 'cut', **OPTIONS, **options)
    expected = in_process(train, whole)
    killed = in_process(train, cut, kill_at)
    assert killed == -signal.SIGKILL

    cut.resume = True
    cut.load_from, _ = last_whole_checkpoint(cut.work_dir)
    resumed = in_process(train, cut)
    assert min(resumed['losses']) == resumed_at
    for i, losses in resumed['losses'].items():
        assert losses == expected['losses'][i]
        assert losses['loss_mimic'] > 0
    for name, value in expected['weights'].items():
        assert torch.equal(value, resumed['weights'][name]), name


def test_killed_while_a_checkpoint_is_written(make_config, tmp_path):
    """The last checkpoint is cut off; the run resumes from the one before."""
    cfg = make_config('seg', tmp_path / 'work')
    killed = in_process(train, cfg, 3, True)
    assert killed == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / 'work').glob('*.pth'))
    assert names == ['iter_2.pth', 'iter_4.pth']
    path, checkpoint = last_whole_checkpoint(tmp_path / 'work')
    assert path.endswith('iter_2.pth')
    assert checkpoint['meta']['iter'] == 2

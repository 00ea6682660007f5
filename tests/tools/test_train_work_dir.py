"""`tools/train.py` in a work_dir that holds another run."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location(
    'tools_train', Path(__file__).parents[2] / 'tools' / 'train.py'
)
tools_train = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tools_train)

CONFIG = """
_base_ = './student.py'
train_cfg = dict(max_iters=3)
val_dataloader = None
val_cfg = None
val_evaluator = None
randomness = dict(seed=None)
"""


@pytest.fixture(scope='module')
def run(seg_config, tmp_path_factory):
    """Calls tools/train.py with a work_dir; it has trained in ``run.trained``."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'student.py').write_text(seg_config)
    numbers = itertools.count()

    def run(work_dir: Path, *args: str) -> None:
        # mmengine finds a logger by the config's name and the second, so two runs with
        # one name within a second would share a log
        config = folder / f'config_{next(numbers)}.py'
        config.write_text(CONFIG)
        with pytest.MonkeyPatch.context() as patch:
            argv = ['train.py', str(config), '--work-dir', str(work_dir)]
            patch.setattr('sys.argv', [*argv, *args])
            patch.setenv('LOCAL_RANK', '0')
            tools_train.main()

    run(folder / 'work')
    run.trained = folder / 'work'
    return run


@pytest.fixture
def work_dir(run, tmp_path) -> Path:
    return shutil.copytree(run.trained, tmp_path / 'work')


def log_of(work_dir: Path) -> str:
    """The log of the last run."""
    return max(work_dir.glob('*/*.log'), key=lambda x: x.stat().st_mtime).read_text()


def test_another_config_does_not_overwrite_the_checkpoints(run, work_dir):
    before = (work_dir / 'iter_3.pth').stat().st_mtime
    with pytest.raises(SystemExit, match=r'these differ: optim_wrapper\)'):
        run(work_dir, '--cfg-options', 'optim_wrapper.optimizer.lr=0.5')
    with pytest.raises(SystemExit, match=r'with this config, .* with --resume'):
        run(work_dir)
    assert (work_dir / 'iter_3.pth').stat().st_mtime == before
    run(work_dir, '--resume')  # nothing is left to do


def test_a_mistake_is_one_sentence_and_the_config_is_in_the_log(run, work_dir, capsys):
    options = ['--cfg-options', 'model.decode_head.channels=8', 'train_cfg.max_iters=5']
    with pytest.raises(SystemExit) as stop:
        run(work_dir, '--resume', *options)
    assert str(stop.value).startswith('\nThe weights in ')
    assert 'train_pipeline' not in capsys.readouterr().out
    assert 'train_pipeline' in log_of(work_dir)
    with pytest.raises(RuntimeError, match='cannot be resumed with this model'):
        run(work_dir, '--resume', '--traceback', *options)
    # an unknown mistake keeps its traceback
    with pytest.raises(TypeError, match='not supported'):
        run(work_dir, '--resume', '--cfg-options', 'optim_wrapper.optimizer.lr=a')


def test_sync_bn_is_replaced_in_several_processes_on_cpus(run, tmp_path, monkeypatch):
    """torch's needs a GPU, and DDP refuses to wrap it, even in one process."""
    values = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    norm = 'model.backbone.norm_cfg.type=SyncBN'
    try:
        run(tmp_path / 'work', '--launcher', 'pytorch', '--cfg-options', norm)
    finally:
        torch.distributed.destroy_process_group()
    assert 'SyncBN needs GPUs: BN replaces it' in log_of(tmp_path / 'work')


def test_resume_takes_the_last_whole_checkpoint_and_its_seed(run, work_dir):
    seed = torch.load(work_dir / 'iter_2.pth', weights_only=False)['meta']['seed']
    last = work_dir / 'iter_3.pth'
    last.write_bytes(last.read_bytes()[:-300])
    run(work_dir, '--resume')
    log = log_of(work_dir)
    assert 'resumed epoch: 0, iter: 2' in log
    assert f'seed={seed}' in log
    assert torch.load(last, weights_only=False)['meta']['seed'] == seed  # whole again


def test_resuming_elsewhere_does_not_mix_either(run, work_dir, tmp_path):
    """The checkpoint comes from one folder, and another run lies in the work_dir."""
    elsewhere = tmp_path / 'elsewhere.pth'
    shutil.copy(work_dir / 'iter_2.pth', elsewhere)
    options = ['--resume', str(elsewhere), '--cfg-options']
    other = 'optim_wrapper.optimizer.lr=0.5'
    before = (work_dir / 'iter_3.pth').stat().st_mtime
    with pytest.raises(SystemExit, match=r'these differ: optim_wrapper\)'):
        run(work_dir, *options, other)
    assert (work_dir / 'iter_3.pth').stat().st_mtime == before
    # a new folder, the same config, or a checkpoint in the work_dir is fine
    run(tmp_path / 'new', *options, other)
    run(work_dir, *options[:2])
    run(work_dir, '--resume', str(work_dir / 'iter_2.pth'), '--cfg-options', other)
    # no intact checkpoint is left to be mixed with
    for path in work_dir.glob('*.pth'):
        path.write_bytes(path.read_bytes()[:-300])
    run(work_dir, *options, other)
    assert torch.load(work_dir / 'iter_3.pth', weights_only=False)['meta']['iter'] == 3


def test_flexible_runner(run, work_dir, tmp_path):
    """It builds its model late, but what it resumes is still checked."""
    strategy = 'strategy.type=SingleDeviceStrategy'
    with pytest.raises(SystemExit, match="`runner_type = 'FlexibleRunner'`"):
        run(tmp_path / 'new', '--cfg-options', strategy)
    options = ['runner_type=FlexibleRunner', strategy]
    run(tmp_path / 'new', '--cfg-options', *options)
    assert (
        torch.load(tmp_path / 'new' / 'iter_3.pth', weights_only=False)['meta']['iter']
        == 3
    )
    (tmp_path / 'new' / 'iter_3.pth').unlink()
    run(tmp_path / 'new', '--resume', '--cfg-options', *options)
    assert 'resumed epoch: 0, iter: 2' in log_of(tmp_path / 'new')
    options.append('model.decode_head.channels=8')
    with pytest.raises(SystemExit, match=r'cannot be resumed with this model'):
        run(tmp_path / 'new', '--resume', '--cfg-options', *options)

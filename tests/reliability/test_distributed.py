"""Training in two processes: DistributedDataParallel over gloo in a real Runner."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from builders import slow
from det_zoo import batch, build_pair
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from processes import output_of
from watch import Unlabel, WatchHook, student, watched

REPO = Path(__file__).parents[2]
# mmengine passes device_ids, which is wrong on CPUs
WRAPPER = dict(
    type='MMDistributedDataParallel',
    device_ids=None,
    broadcast_buffers=False,
    find_unused_parameters=False,
)


def first_weights(runner, _) -> torch.Tensor:
    return next(student(runner).parameters()).detach().clone()


def train_and_tell(cfg: Config, *hooks: Hook) -> dict:
    """Train in each process, where DDP must know the student alone."""
    calls = []
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    model = student(runner)
    load = model.teacher.load

    def load_and_watch(*args):
        load(*args)
        if not calls:
            backbone = model.teacher.model.backbone
            backbone.register_forward_hook(lambda *_: calls.append(runner.iter))
            calls.append('loaded')

    model.teacher.load = load_and_watch
    with mock.patch.object(WatchHook, 'after', first_weights):
        runner.train()
    watch = watched(runner)
    ddp = runner.model._get_ddp_logging_data()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert ddp['num_parameter_tensors'] == len(trained)
    assert ddp['total_parameter_size_bytes'] == sum(p.nbytes for p in trained)
    assert len(runner.model.modules_buffers) == len(list(model.buffers()))
    assert list(model.teacher.model.parameters())
    return dict(
        weights={k: v.clone() for k, v in model.state_dict().items()},
        buffers=[name for name, _ in model.named_buffers()],
        losses=watch.losses,
        after_each=watch.seen,
        teacher_ran_at=calls[1:],
    )


def assert_same_weights(first: dict, second: dict) -> None:
    """The processes saw different images and ended with the same weights."""
    assert first['losses'] != second['losses']
    for name in first['weights'].keys() - set(first['buffers']):
        # (each process has its own buffers, or they are broadcast before a step)
        assert torch.equal(first['weights'][name], second['weights'][name]), name


@pytest.fixture
def train_in_two(pair, make_config, tmp_path):
    """Trains a segmentor in two processes; returns what each reports."""

    def train(**options) -> list[dict]:
        cfg = make_config('seg', tmp_path / 'work', launcher='pytorch', **options)
        first, second = results = pair(train_and_tell, cfg)
        assert_same_weights(first, second)
        # the checkpoint holds what each process has
        path = tmp_path / 'work' / 'iter_4.pth'
        saved = torch.load(path, weights_only=False)['state_dict']
        assert saved.keys() == first['weights'].keys()
        assert all(torch.equal(saved[k], v) for k, v in first['weights'].items())
        return results

    return train


@pytest.mark.parametrize('family', ['seg', *slow(['det'])])
def test_processes_with_other_mixes_of_labels_do_not_wait(
    pair, make_config, tmp_path, family
):
    """All, some or no images are labelled; relations span both processes."""
    loss = dict(type='mmdist.DISTLoss', sync=True)
    kind, own, options = {
        'seg': ('SegLogits', 'decode.loss_ce', {'train_cfg.max_iters': 4}),
        'det': ('DenseLogits', 'loss_cls', {'train_cfg.max_epochs': 2}),
    }[family]
    options['model.distill'] = dict(dist=dict(type=f'mmdist.{kind}', loss=loss))
    options |= dict(launcher='pytorch', model_wrapper_cfg=WRAPPER)
    cfg = make_config(family, tmp_path / 'work', **options)
    results = pair(train_and_tell, cfg, Unlabel())
    assert_same_weights(*results)
    for rank, result in enumerate(results):
        for i, losses in result['losses'].items():
            assert losses['loss_dist'] > 0
            assert (losses[own] == 0) == ((i + rank) % 3 == 0)


@pytest.mark.parametrize('find_unused', [False, *slow([True])])
def test_processes_end_with_the_same_weights(train_in_two, find_unused):
    """With and without broadcast buffers; mmengine's default is without."""
    wrapper = dict(
        WRAPPER, find_unused_parameters=find_unused, broadcast_buffers=find_unused
    )
    for result in train_in_two(model_wrapper_cfg=wrapper):
        assert result['teacher_ran_at'] == [0, 1, 2, 3]
        assert all(losses['loss_dist'] > 0 for losses in result['losses'].values())


@pytest.mark.slow
def test_adapters_train_and_the_schedule_stops_the_teacher(train_in_two):
    """After the stop, the adapters take no part in the loss; DDP must go on."""
    results = train_in_two(
        model_wrapper_cfg=WRAPPER,
        **{
            'model.distill': dict(
                dist=dict(type='mmdist.SegLogits'),
                mimic=dict(type='mmdist.Features', student='backbone', adapt=True),
            ),
            'custom_hooks': [
                dict(type='WatchHook'),
                dict(type='mmdist.DistillScheduleHook', stop=2),
            ],
        },
    )
    for result in results:
        assert any(name.startswith('distill.mimic') for name in result['weights'])
        assert result['teacher_ran_at'] == [0, 1]
        losses = [result['losses'][i]['loss_mimic'] for i in range(4)]
        assert losses[0] > 0
        assert losses[2:] == [0, 0]


def cascade_step() -> dict:
    """A step of a cascade; the second process has no proposals and stops early."""
    sync = dict(type='mmdist.RoILogits', loss=dict(type='mmdist.DISTLoss', sync=True))
    model = build_pair(
        'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', distill=dict(dist=sync)
    )
    data = batch(model)
    if torch.distributed.get_rank() == 1:
        model.train_cfg.rpn_proposal.max_per_img = 0
        for sample in data['data_samples']:
            sample.gt_instances = sample.gt_instances[:0]
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    return {key: value.item() for key, value in losses.items() if 'dist' in key}


def test_a_cascade_that_stops_early_keeps_the_processes_in_step(pair):
    """With `sync`, each process must call every stage's loss, or the others hang."""
    first, second = pair(cascade_step)
    assert first == pytest.approx(second, abs=1e-6)  # from the first process's rows
    for stage in range(3):
        assert 0 < first[f'loss_dist_s{stage}'] < 4
        assert first[f'dist_s{stage}_intra'] != 0


@pytest.mark.slow
def test_gradients_are_accumulated(train_in_two):
    results = train_in_two(
        model_wrapper_cfg=WRAPPER,
        **{'optim_wrapper.accumulative_counts': 2},
    )
    for result in results:
        assert result['teacher_ran_at'] == [0, 1, 2, 3]
    first = results[0]['after_each']
    assert torch.equal(first[1], first[2])  # no step after the third batch
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[2], first[3])


def test_sync_batch_norm_is_the_students_alone(make_config, tmp_path):
    """It runs on GPUs only; a CPU can check where mmengine puts it."""
    cfg = make_config('seg', tmp_path)
    init_default_scope('mmseg')
    theirs = copy.deepcopy(cfg.model.student)
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        theirs[part].norm_cfg = dict(type='SyncBN')  # the teacher's config has it
    cfg.model.teacher.config = theirs
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = convert_sync_batchnorm(model, 'torch')  # as with `sync_bn = 'torch'`
    ours, theirs = (
        sum(isinstance(m, torch.nn.SyncBatchNorm) for m in part.modules())
        for part in (model, model.teacher.model)
    )
    assert ours > 0
    assert theirs == 0


on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason='trains over gloo')


def launched(*command, **environ: str) -> str:
    """Run a launcher with this environment's programs on PATH; returns its output."""
    first = environ.pop('FIRST', '')
    path = f'{first}{Path(sys.executable).parent}:{os.environ["PATH"]}'
    output = output_of('bash', *command, cwd=REPO, PATH=path, **environ)
    assert 'GPU number: 2' in output  # mmengine's word for processes
    assert 'loss_dist' in output
    return output


@pytest.mark.slow
@on_cpus
def test_dist_train_script(make_config, tmp_path):
    """`tools/dist_train.sh CONFIG 2` without GPUs; takes 30 seconds."""
    cfg = make_config('seg', tmp_path / 'work', custom_hooks=[])
    cfg.dump(tmp_path / 'distilled.py')
    assert shutil.which('torchrun', path=Path(sys.executable).parent)
    script = REPO / 'tools' / 'dist_train.sh'
    output = launched(script, tmp_path / 'distilled.py', '2', PORT='29617')
    assert 'Distributed training: True' in output
    assert (tmp_path / 'work' / 'iter_4.pth').exists()


# Like Slurm, start the command once for each task and tell it which one it is.
SRUN = """#!/usr/bin/env bash
set -u
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
export SLURM_NTASKS=$tasks SLURM_NODELIST=localhost
pids=()
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid" || exit 1
done
"""
SCONTROL = '#!/usr/bin/env bash\necho 127.0.0.1\n'
# mmengine's launcher for Slurm chooses a GPU without checking that there is one
NO_GPU = 'import torch\ntorch.cuda.set_device = lambda device: None\n'


@pytest.mark.slow
@on_cpus
def test_slurm_train_script(make_config, tmp_path):
    """`tools/slurm_train.sh` with a stand-in for srun; takes 30 seconds."""
    for name, text in dict(srun=SRUN, scontrol=SCONTROL).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'sitecustomize.py').write_text(NO_GPU)
    cfg = make_config('seg', tmp_path / 'elsewhere', custom_hooks=[])
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.model_wrapper_cfg = WRAPPER
    cfg.dump(tmp_path / 'distilled.py')
    work_dir = tmp_path / 'work'
    output = launched(
        *(REPO / 'tools' / 'slurm_train.sh', 'partition', 'job'),
        *(tmp_path / 'distilled.py', work_dir),
        *('--cfg-options', 'train_cfg.max_iters=3'),
        GPUS='2',
        SRUN_ARGS='--quotatype=spot --comment=test',
        FIRST=f'{tmp_path}:',
        PYTHONPATH=str(tmp_path),
        MASTER_PORT='29618',
    )
    assert 'Distributed launcher: slurm' in output
    assert (work_dir / 'iter_3.pth').exists()

"""Tests that need a GPU: the loss at full size, and training in GPU precisions.

`python -m tools.dev.gpu_check` runs this file. Tests with `training` in their name need
mmcv with ops, mmdet and mmseg. `tests/losses/test_correlations_gpu.py` uses a GPU too.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import textbook
from mmdist.losses import DISTLoss, correlations
from tools.logs import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
]
ROOT = Path(__file__).resolve().parents[1]
HALF = (torch.float16, torch.bfloat16)
# all sizes of tiles, images apart and together, many and few classes
SIZES = [
    (8, 19, 128, 256),
    (2, 720, 100, 136),
    (1024, 81),
    (1, 1203, 40, 50),
    (3, 2, 65, 63),
]
# types of student and teacher, and number of sizes: kernels are compiled for each
TYPES = [
    (torch.float32, torch.float32, 5),
    (torch.bfloat16, torch.bfloat16, 3),
    (torch.float16, torch.float16, 1),
    (torch.float64, torch.float64, 1),
    (torch.float32, torch.bfloat16, 1),
    (torch.float16, torch.float32, 1),
]


def logits(*shape: int) -> torch.Tensor:
    """Student's and teacher's logits, correlated at about 0.7."""
    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).cuda()
    return torch.stack([noise[0], 0.7 * noise.sum(0)])


def compare(student, teacher, mask=None, **options) -> None:
    """Check that the kernels are as exact as their types allow, against float64."""
    rows = [x.detach().double().movedim(1, -1) for x in (student, teacher)]
    rows = [x.flatten(0, -2) if mask is None else x[mask] for x in rows]
    expected = textbook.dist_loss(rows[0].requires_grad_(), rows[1], **options)
    (expected_grad,) = torch.autograd.grad(expected, rows[0])
    loss = DISTLoss(eps=1e-8, **options)
    loss.path = 'gpu'
    student = student.detach().requires_grad_()  # keeps the layout
    value = loss(student, teacher, mask)
    grad = torch.autograd.grad(value, student)[0].movedim(1, -1)
    if mask is not None:
        assert not grad[~mask].any()
        grad = grad[mask]
    exact = torch.float64 in (student.dtype, teacher.dtype)
    limit = 1e-9 if exact else 1e-5
    assert abs(value.item() / expected.item() - 1) < limit
    # the gradient is rounded to the type of the logits
    limit = 1e-2 if student.dtype in HALF else 10 * limit
    error = (grad.reshape(expected_grad.shape).double() - expected_grad).norm()
    assert error < limit * expected_grad.norm()


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('student, teacher, number', TYPES, ids=str)
def test_types_and_sizes(student, teacher, number, activation):
    # otherwise training would take the slower path, and warn
    device = torch.device('cuda:0')
    assert correlations.kernels_work(device, student, teacher, activation)
    for size in SIZES[:number]:
        s, t = logits(*size)
        compare(s.to(student), t.to(teacher), activation=activation)


def test_masks_and_options():
    student, teacher = logits(2, 19, 61, 67)
    half = torch.rand(2, 61, 67, device='cuda') < 0.5
    half[0, :30] = False  # whole tiles without a row
    two = torch.zeros_like(half)
    two[0, 0, 0] = two[1, 2, 3] = True
    for options in ({'tau': 4.0}, {'beta': 0.0}, {'gamma': 0.0}):
        for mask in (None, half, two):
            compare(student, teacher, mask, **options)


def test_a_teacher_with_nan_is_an_error():
    code = """if True:
        import torch
        from mmdist.losses import DISTLoss
        student, teacher = torch.randn(2, 2, 19, 8, 8, device='cuda').unbind()
        teacher[0, 3, 2, 1] = float('nan')
        mask = torch.ones(2, 8, 8, dtype=torch.bool, device='cuda')
        mask[0, 2, 1] = False
        print(DISTLoss()(student, teacher, mask).isfinite().item(), flush=True)
        DISTLoss()(student, teacher)
        torch.cuda.synchronize()"""
    # in a process of its own, which cannot use the GPU afterwards
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'True\n'
    assert 'assert' in done.stderr


# --- training; a teacher with random weights will do


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with a few scenes of digits."""
    folder = tmp_path_factory.mktemp('digits')
    few = ('--train', '64', '--train-few', '64', '--val', '8')
    command = [sys.executable, '-m', 'tools.dev.make_digits', *few]
    subprocess.run([*command, '--out', str(folder / 'data/digits')], check=True)
    return folder


def train(folder: Path, base: str, more: str, *options, launcher=()) -> list[dict]:
    """Train a changed config of the quickstart; return what was logged."""
    config = folder / 'config.py'
    config.write_text(
        f'_base_ = {str(ROOT / "configs" / base)!r}\n'
        f'model = dict(teacher=dict(checkpoint=None, allow_random=True))\n{more}'
    )
    command = [sys.executable, *launcher, ROOT / 'tools/train.py', config, *options]
    subprocess.run([str(part) for part in command], cwd=folder, check=True)
    work_dir = folder / options[options.index('--work-dir') + 1]
    logged = [x for x in read_log(work_dir) if 'loss' in x]
    values = [v for x in logged for k, v in x.items() if 'loss' in k or 'dist_' in k]
    assert values and all(map(math.isfinite, values))
    return logged


def test_training_with_amp_and_ema_is_resumed(folder):
    from mmdist.checkpoint import load_checkpoint

    more = """
custom_hooks = [dict(type='EMAHook', momentum=0.01)]
max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=100)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(
    type='CheckpointHook', interval=1, filename_tmpl='epoch_{}.pth'))
"""
    base = 'det/quickstart/dist_retinanet_w32-w16_digits.py'
    options = ('--work-dir', 'det', '--amp')
    first = train(folder, base, more, *options)
    longer = ('--resume', '--cfg-options', 'train_cfg.max_epochs=3')
    both = train(folder, base, more, *options, *longer)
    assert len(both) == 1.5 * len(first)
    assert both[len(first)]['step'] == first[-1]['step'] + 1
    checkpoint = load_checkpoint(str(folder / 'det/epoch_3.pth'))
    state, ema = checkpoint['state_dict'], checkpoint['ema_state_dict']
    assert all(x.isfinite().all() for x in (*state.values(), *ema.values()))
    assert not any('teacher' in key for key in state)
    assert len(ema) >= len(state)


@pytest.mark.parametrize('processes', [1, 2])
def test_training_with_syncbn_over_nccl(folder, processes):
    if processes > torch.cuda.device_count():
        pytest.skip('there is one GPU')
    more = """
train_cfg = dict(max_iters=30, val_interval=1000)
default_hooks = dict(logger=dict(interval=1))
custom_hooks = []
model["distill"] = dict(dist=dict(loss=dict(sync=True)))
sync_bn = 'torch'
"""
    launcher = ('-m', 'torch.distributed.run', '--standalone')
    launcher += (f'--nproc_per_node={processes}',)
    options = ('--work-dir', f'seg_{processes}', '--launcher', 'pytorch')
    base = 'seg/quickstart/dist_deeplabv3_w32-w8_digits.py'
    assert len(train(folder, base, more, *options, launcher=launcher)) == 30

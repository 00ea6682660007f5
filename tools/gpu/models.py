"""Stages 5 to 7: models, training, the study. They need mmcv's ops, mmdet and mmseg."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from .report import CUDA, DEVICE, ROOT, Run, Skip, at_most, need_gpu, right


def need_ops() -> None:
    """Skip what needs models where their libraries are not installed.

    Raises:
        Exception: They are there, and do not work.
    """
    from tools.check_env import RUN_OPS

    for name in ('mmcv', 'mmcv.ops', 'mmdet', 'mmseg', 'scipy', 'pycocotools'):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise Skip(f'needs mmcv with its ops, mmdet and mmseg: {error}') from None
    exec(RUN_OPS, {})


# --- 5


def step(run: Run, part: str) -> None:
    need_gpu(run)
    need_ops()
    from benchmarks import step

    wanted, compiled = part.removesuffix(', compiled'), part.endswith(', compiled')
    (name,) = (x for x in step.PAIRS if x.startswith(wanted))
    pair = step.PAIRS[name]
    size, seconds = pair.full_size, 2.0
    settings = step.SETTINGS[3:] if compiled else step.SETTINGS[:3]
    if run.small:
        if compiled:
            raise Skip('takes long, and --small is asked for')
        # DINO looks for its 900 queries in the image
        size, seconds = ((256, 256) if 'DINO' in name else (64, 64)), 0.0
        settings = settings[:1]
    table = f'{name}, {size[0]}x{size[1]}, batch of 2'
    for one in step.measured(name, seconds, DEVICE, size, settings):
        if one.error:
            run.row(table, one.setting, does_not_run=one.error)
            continue
        cells = {f'{k}, ms': 1e3 * v for k, v in one.time.items()}
        cells['distilled / both'] = at_most(one.overhead, pair.goals[0])
        if one.peak:
            for k, v in one.peak.items():
                cells[f'peak of {k}, MiB'] = v / 2**20
            cells['peak / what student and teacher need'] = at_most(one.memory, 1.05)
            extra = one.waits['distilled'] - one.waits['both']
            # queries are matched on the CPU
            cells['waits more than both'] = (
                extra if 'DINO' in name else at_most(extra, 0)
            )
        run.row(table, one.setting, **cells)


# --- 6

# A teacher with random weights will do: it is about how training runs.
TRAINING = """
_base_ = '{base}'
model = dict(teacher=dict(checkpoint=None, allow_random=True))
{more}
"""


def write_config(run: Run, base: str, more: str) -> Path:
    config = run.work / f'{base.split("/")[0]}.py'
    config.write_text(TRAINING.format(base=ROOT / 'configs' / base, more=more))
    return config


def train(run: Run, config: Path, folder: Path, *options: str, launcher=()) -> list:
    """Train; returns what was logged."""
    from tools import runs

    command = [sys.executable, *launcher, str(ROOT / 'tools' / 'train.py'), str(config)]
    command += ['--work-dir', str(folder), *options]
    subprocess.run(command, cwd=run.work, check=True, env=training_environment())
    return [x for x in runs.read_log(folder) if 'loss' in x]


def training_environment() -> dict[str, str]:
    environment = dict(os.environ)
    if not CUDA:
        environment.pop('TRITON_INTERPRET')
        environment['OMP_NUM_THREADS'] = '1'
    return environment


def make_digits(run: Run) -> None:
    few = ['--train', '32', '--train-few', '32', '--val', '8'] if run.small else []
    command = [sys.executable, str(ROOT / 'tools' / 'make_digits.py'), *few]
    subprocess.run(command, cwd=run.work, check=True)


def is_finite(entries: list[dict]) -> bool:
    values = [v for x in entries for k, v in x.items() if 'loss' in k or 'dist_' in k]
    return bool(values) and all(map(math.isfinite, values))


def amp_ema_resume(run: Run) -> None:
    need_gpu(run)
    need_ops()
    from mmdist.checkpoint import load_checkpoint

    make_digits(run)
    epochs = 1 if run.small else 2
    more = (
        "custom_hooks = [dict(type='EMAHook', momentum=0.01)]\n"
        f'max_epochs = {epochs}\n'
        'train_cfg = dict(max_epochs=max_epochs, val_interval=100)\n'
        "default_hooks = dict(logger=dict(interval=1), checkpoint=dict(type='"
        "CheckpointHook', interval=1, filename_tmpl='epoch_{}.pth'))\n"
    )
    config = write_config(run, 'det/quickstart/dist_retinanet_w32-w16_digits.py', more)
    amp = ['--amp'] * CUDA  # on a CPU, mmengine has none of fp16
    folder = run.work / 'det'
    table = 'RetinaNet on the digits' + (', AMP fp16' if CUDA else '')
    logged = train(run, config, folder, *amp)
    first, last = logged[0], logged[-1]
    run.row(
        table,
        f'{last["step"]} steps',
        losses_finite=right(is_finite(logged)),
        loss=f'{first["loss"]:.3g} to {last["loss"]:.3g}',
        inter=last['dist_inter'],
        s_per_step=last['time'],
        peak_MiB=last.get('memory', ''),
    )
    longer = [f'train_cfg.max_epochs={epochs + 1}']
    again = train(run, config, folder, *amp, '--resume', '--cfg-options', *longer)
    more_steps = [x['step'] for x in again[len(logged) :]]
    follows = more_steps and more_steps[0] == last['step'] + 1
    run.row(
        table,
        'resumed',
        losses_finite=right(is_finite(again)),
        goes_on=right(follows, f'at step {more_steps[0] if more_steps else None}'),
        loss=f'{again[-1]["loss"]:.3g}',
    )
    checkpoint = load_checkpoint(str(folder / f'epoch_{epochs + 1}.pth'))
    ema = checkpoint.get('ema_state_dict', {})
    state = checkpoint['state_dict']
    finite = [x.isfinite().all().item() for x in (*state.values(), *ema.values())]
    run.row(
        'the checkpoint then',
        'tensors',
        finite=right(all(finite), len(finite)),
        none_of_the_teacher=right(not any('teacher' in key for key in state)),
        mean_of_weights=right(len(ema) >= len(state), len(ema)),
    )


def nccl_syncbn(run: Run) -> None:
    need_gpu(run)
    need_ops()
    make_digits(run)
    steps = 3 if run.small else 30
    more = (
        f'train_cfg = dict(max_iters={steps}, val_interval=1000)\n'
        'default_hooks = dict(logger=dict(interval=1))\n'
        'custom_hooks = []\n'
        'model["distill"] = dict(dist=dict(loss=dict(sync=True)))\n'
        # it needs a GPU
        + ("sync_bn = 'torch'\n" if CUDA else '')
    )
    config = write_config(run, 'seg/quickstart/dist_deeplabv3_w32-w8_digits.py', more)
    table = 'DeepLabV3 on the digits' + (', SyncBN, NCCL' if CUDA else ', gloo')
    cards = torch.cuda.device_count() if CUDA else 1
    for processes in (1, 2):
        name = f'{processes} process' + ('es' if processes > 1 else '')
        if processes > cards:
            run.row(table, name, losses_finite=f'not run: {cards} card')
            continue
        launcher = ['-m', 'torch.distributed.run', '--standalone']
        launcher += [f'--nproc_per_node={processes}']
        folder = run.work / f'seg_{processes}'
        logged = train(run, config, folder, '--launcher', 'pytorch', launcher=launcher)
        run.row(
            table,
            name,
            losses_finite=right(len(logged) == steps and is_finite(logged)),
            loss=f'{logged[0]["loss"]:.3g} to {logged[-1]["loss"]:.3g}',
            s_per_step=logged[-1]['time'],
        )


def quickstart(run: Run) -> None:
    need_gpu(run)
    need_ops()
    command = [sys.executable, str(ROOT / 'tools' / 'quickstart.py')]
    command += ['--smoke'] * run.small
    subprocess.run(command, cwd=run.work, check=True, env=training_environment())
    report = (run.work / 'work_dirs' / 'quickstart' / 'report.md').read_text()
    head, _, *rows = [x for x in report.splitlines() if x.startswith('|')]
    titles, *cells = [
        [x.strip() for x in li.strip('|').split('|')] for li in (head, *rows)
    ]
    for line in cells:
        named = dict(zip(titles, line, strict=True))
        run.row('quickstart', ', '.join(line[:2]), **dict([*named.items()][2:]))


# --- 7


def study(run: Run) -> None:
    need_gpu(run, small_will_do=False)
    need_ops()
    if run.data_root is None:
        raise Skip('needs its images, --data-root; see `python -m study --help`')
    minutes = (run.seconds - 30) / 60
    command = [sys.executable, '-m', 'study', '--scale', 'full']
    command += ['--methods', 'alone', 'kl-t1', 'dist', '--budget', f'{minutes:.2f}']
    command += ['--data-root', str(run.data_root), '--work-dir', str(run.work)]
    command += ['--out', str(run.out / 'study')]
    command += ['--weights', str(run.weights)] if run.weights else []
    subprocess.run(command, cwd=ROOT, check=True)
    lines = run.out / 'study' / 'results.jsonl'
    for line in lines.read_text().splitlines() if lines.exists() else ():
        cell = json.loads(line)
        run.row(
            'study',
            f'{cell["task"]}, {cell["method"]}, seed {cell["seed"]}',
            score=cell['score'],
        )

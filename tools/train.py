"""Train a model: a student with its teacher, or any mmdet or mmseg config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from torch import nn

from mmdist.checkpoint import load_checkpoint
from mmdist.registry import MODELS
from mmdist.work_dir import check_fits, last_whole_checkpoint, refuse_other_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--amp', action='store_true', help='train with automatic mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size (needs `auto_scale_lr`)',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the latest of the work dir',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, key=value',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none'
    )
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    """The config with the command line's settings merged into it."""
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def load_distilling(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> Config:
    """As :func:`load_config`; the parser stops if the config does not distil."""
    try:
        cfg = load_config(args)
    except Exception as error:  # it is Python: anything may be wrong with it
        parser.error(f'{args.config} cannot be read: {error or type(error).__name__}')
    if (cfg.get('model') or {}).get('student') is None:
        parser.error(f'{args.config} does not distil: `model` has no `student`.')
    return cfg


def seed_iterations(cfg: Config) -> None:
    """Let a resumed run draw the random numbers of one that was not interrupted."""
    hooks = cfg.get('custom_hooks') or []
    if all(hook.get('type') != 'mmdist.IterSeedHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmdist.IterSeedHook')]


def earlier_run(cfg: Config) -> tuple[str, dict] | None:
    """What to resume from, if that is wanted; nothing of another run is mixed in."""
    if cfg.get('resume') and cfg.get('load_from'):
        found = cfg.load_from, load_checkpoint(cfg.load_from)
        if Path(cfg.load_from).resolve().parent != Path(cfg.work_dir).resolve():
            refuse_other_runs(cfg)
    else:
        found = last_whole_checkpoint(cfg.work_dir)
    if not cfg.get('resume'):
        if found:
            refuse_other_config(cfg, *reversed(found))
        return None
    if found:
        path, checkpoint = found
        cfg.load_from = path
        # The data come in an order that depends on the seed, and the Runner makes the
        # loader before it reads the seed of the checkpoint.
        if cfg.get('randomness', {}).get('seed') is None:
            cfg.merge_from_dict({'randomness.seed': checkpoint['meta']['seed']})
    return found


def refuse_other_runs(cfg: Config) -> None:
    """Stop if the work_dir holds a run that is not the one to resume from elsewhere."""
    try:
        there = last_whole_checkpoint(cfg.work_dir)
    except RuntimeError:  # all are cut off: that is why another one is named
        return
    if there:
        refuse_other_config(cfg, *reversed(there))


def use_cpus(cfg: Config) -> None:
    """Let several processes train without a GPU; mmengine's launchers want one each."""
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,  # as mmengine has it without a wrapper's config
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    ) | dict(cfg.get('model_wrapper_cfg') or {}, device_ids=None)


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise SystemExit(
                '--auto-scale-lr needs `auto_scale_lr = dict(base_batch_size=...)` in '
                'the config: the batch size that its learning rate was chosen for.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    seed_iterations(cfg)
    found = earlier_run(cfg)
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        use_cpus(cfg)
    if cfg.get('strategy') and 'runner_type' not in cfg:
        raise SystemExit(
            "`strategy` is for `runner_type = 'FlexibleRunner'`: mmengine's Runner "
            'does without it and does not say so. Set that, or remove `strategy`.'
        )
    runner = RUNNERS.build(cfg)
    if found:
        model = runner.model
        if not isinstance(model, nn.Module):  # FlexibleRunner builds it in train()
            model = MODELS.build(model)
        if is_model_wrapper(model):
            model = model.module
        check_fits(model, *reversed(found))
        del model
    del found
    runner.train()


if __name__ == '__main__':
    main()

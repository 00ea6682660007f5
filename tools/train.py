"""Train a model: a student with its teacher, or any mmdet or mmseg config."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

import mmdist
from mmdist.checkpoint import load_checkpoint
from mmdist.data.labels import data_sets_in_words
from mmdist.registry import MODELS, why_not_built
from mmdist.teachers.teacher import read_config
from mmdist.work_dir import check_fits, last_whole_checkpoint, refuse_other_config


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the arguments that training and testing share, and parse all."""
    add = parser.add_argument
    add('--work-dir', help='where logs, checkpoints and metrics go')
    add('--cfg-options', nargs='+', action=DictAction, help='key=value of the config')
    add('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    add('--traceback', action='store_true', help='show where a mistake was found')
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    add('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='path of the config file')
    add('--amp', action='store_true', help='train with automatic mixed precision')
    scale = 'scale the learning rate by the batch size (needs `auto_scale_lr`)'
    add('--auto-scale-lr', action='store_true', help=scale)
    text = 'continue from this checkpoint; without a path, from the latest'
    add('--resume', nargs='?', const='auto', help=text)
    return parse(parser)


@contextmanager
def mistakes_in_words(frames: bool) -> Iterator[None]:
    """For a known mistake, exit with its message alone, unless ``frames``."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = Path(mmdist.__file__).parent in Path(last.filename).parents
        is_ours = is_ours and last.line.startswith('raise ')  # torch raises there too
        said = str(error) if is_ours else why_not_built(error) or why_not_loaded(error)
        if not said and isinstance(error, FileNotFoundError):
            said = str(error)
        if frames or not said:
            raise
        raise SystemExit(f'\n{said}') from None


def why_not_loaded(error: Exception) -> str:
    """Why a Runner cannot read the checkpoint that it loads, or ''."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'load_checkpoint' and 'filename' in frame.f_locals:
            try:
                load_checkpoint(frame.f_locals['filename'])
            except (RuntimeError, ValueError, FileNotFoundError) as found:
                return str(found)
            return ''  # the file is not the reason
    return ''


def load_config(args: argparse.Namespace) -> Config:
    """Load the config, with the command line's settings merged into it."""
    cfg = read_config(args.config)
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
    """Like :func:`load_config`, but the parser stops if the config does not distil."""
    try:
        cfg = load_config(args)
    except Exception as error:  # any, because of --cfg-options
        parser.error(str(error) or type(error).__name__)
    if (cfg.get('model') or {}).get('student') is None:
        parser.error(f'{args.config} does not distil: `model` has no `student`.')
    return cfg


def seed_iterations(cfg: Config) -> None:
    """Make a resumed run draw the same random numbers as an uninterrupted one."""
    hooks = cfg.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)):
        raise SystemExit(f'`custom_hooks` must be a list of dicts, got {hooks!r:.200}.')
    if all(hook.get('type') != 'mmdist.IterSeedHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmdist.IterSeedHook')]


def earlier_run(cfg: Config) -> tuple[str, dict] | None:
    """The checkpoint to resume from, if wanted; refuses to mix two runs."""
    if not cfg.get('resume'):
        if there := last_whole_checkpoint(cfg.work_dir):
            refuse_other_config(cfg, *reversed(there), or_same=True)
        return None
    if cfg.get('load_from'):
        found = cfg.load_from, load_checkpoint(cfg.load_from)
        if Path(cfg.load_from).resolve().parent != Path(cfg.work_dir).resolve():
            there = None
            with suppress(RuntimeError):  # all are cut off, hence another one is named
                there = last_whole_checkpoint(cfg.work_dir)
            if there:
                refuse_other_config(cfg, *reversed(there))
    else:
        found = last_whole_checkpoint(cfg.work_dir)
    if found:
        path, checkpoint = found
        cfg.load_from = path
        # The order of the data depends on the seed, and the Runner builds the loader
        # before it reads the seed of the checkpoint.
        if cfg.get('randomness', {}).get('seed') is None:
            cfg.merge_from_dict({'randomness.seed': checkpoint['meta']['seed']})
    return found


def use_cpus(cfg: Config) -> None:
    """Let several processes train without GPUs; mmengine's launchers want one each."""
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,  # mmengine's default without a wrapper config
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    ) | dict(cfg.get('model_wrapper_cfg') or {}, device_ids=None)


def build_runner(cfg: Config, on_cpus: bool) -> Runner:
    """Build the runner; the whole config goes to its log file, not to the terminal."""
    kind = RUNNERS.get(cfg.get('runner_type', 'Runner'))

    def build_logger(self: Runner, *args, **kwargs) -> MMLogger:
        logger = kind.build_logger(self, *args, **kwargs)
        logger.handlers[0].addFilter(lambda x: not str(x.msg).startswith('Config:\n'))
        return logger

    def wrap_model(self: Runner, wrapper: dict | None, model: nn.Module) -> nn.Module:
        if on_cpus and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            self.logger.warning('SyncBN needs GPUs: BN replaces it in each process.')
            model = revert_sync_batchnorm(model)
        return kind.wrap_model(self, wrapper, model)

    own = dict(build_logger=build_logger, wrap_model=wrap_model)
    return type(kind.__name__, (kind,), own).from_cfg(cfg)


def train(args: argparse.Namespace) -> None:
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
    on_cpus = args.launcher == 'pytorch' and not torch.cuda.is_available()
    if on_cpus:
        use_cpus(cfg)
    if cfg.get('strategy') and 'runner_type' not in cfg:
        raise SystemExit(
            "`strategy` needs `runner_type = 'FlexibleRunner'`: mmengine's Runner "
            'ignores it silently. Set `runner_type`, or remove `strategy`.'
        )
    runner = build_runner(cfg, on_cpus)
    if found:
        model = runner.model
        if not isinstance(model, nn.Module):  # FlexibleRunner builds it in train()
            model = MODELS.build(model)
        check_fits(model.module if is_model_wrapper(model) else model, *reversed(found))
        del model
    del found
    with data_sets_in_words(cfg):
        runner.train()


def main() -> None:
    args = parse_args()
    with mistakes_in_words(args.traceback):
        train(args)


if __name__ == '__main__':
    main()

"""Export the student of a distillation checkpoint, for its own config to load strictly.

Weights used only to distil (`distill.*`), the optimizer and the logs are left out; with
EMA, the averaged weights are exported. The file name ends in the first 8 digits of its
sha256, as in the model zoos. With --config, a config of the plain student for testing
and inference, without `_base_`, is written beside it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import OrderedDict
from pathlib import Path

import torch
from mmengine.config import Config

from mmdist.checkpoint import check_finite, load_checkpoint
from mmdist.teachers.teacher import build_model, load_config

PREFIX = 'distill.'
# Without the distillation config and file names of the machine it was trained on.
META = ('dataset_meta', 'epoch', 'iter', 'mmengine_version')
# What testing and inference read of a config. Hooks and data sets of mmdist are left
# out, so they need no mmdist.
FOR_TESTING = (
    'default_scope', 'custom_imports', 'model', 'data_preprocessor', 'test_pipeline',
    'test_dataloader', 'test_cfg', 'test_evaluator', 'tta_model', 'tta_pipeline',
    'default_hooks', 'env_cfg', 'vis_backends', 'visualizer', 'log_level',
    'log_processor',
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('checkpoint', help='path of the checkpoint')
    text = 'path of the result, without the digits (default: <checkpoint>_student.pth)'
    add('--out', help=text)
    text = "the student's config, or the distillation config: checks that the result "
    text += 'loads strictly, and writes a config of the plain student beside it'
    add('--config', help=text)
    text = 'read the checkpoint safely; otherwise code in the file may run'
    yes_or_no = argparse.BooleanOptionalAction
    add('--weights-only', action=yes_or_no, default=True, help=text)
    return parser.parse_args()


def student_of(checkpoint: dict) -> dict:
    """``state_dict`` and ``meta`` of the plain student, from a Runner's checkpoint.

    With EMAHook, its ``state_dict`` already holds the averaged weights.

    Raises:
        ValueError: There is no ``state_dict``.
    """
    if 'state_dict' not in checkpoint:
        raise ValueError(
            f'The checkpoint has no `state_dict`, only {list(checkpoint)}. Give one '
            'that the Runner saved, such as epoch_12.pth.'
        )
    state = checkpoint['state_dict']
    kept = OrderedDict((k, v) for k, v in state.items() if not k.startswith(PREFIX))
    kept._metadata = OrderedDict(
        (k, v)
        for k, v in getattr(state, '_metadata', {}).items()
        if not f'{k}.'.startswith(PREFIX)
    )
    meta = checkpoint.get('meta') or {}
    return dict(meta={k: meta[k] for k in META if k in meta}, state_dict=kept)


def save(student: dict, out: Path) -> Path:
    """Save, with the first 8 digits of the file's sha256 in its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    name = out.name.removesuffix('.pth')
    unnamed = out.with_name(f'{name}.tmp')
    torch.save(student, unnamed)
    digits = hashlib.sha256(unnamed.read_bytes()).hexdigest()[:8]
    return unnamed.rename(out.with_name(f'{name}-{digits}.pth'))


def main() -> None:
    args = parse_args()
    checkpoint = load_checkpoint(args.checkpoint, args.weights_only)
    student = student_of(checkpoint)
    check_finite(student['state_dict'], args.checkpoint)
    if args.config:
        cfg = load_config(args.config)  # its model is the plain student
        build_model(cfg).load_state_dict(student['state_dict'], strict=True)
    path = Path(args.checkpoint)
    out = Path(args.out) if args.out else path.with_name(f'{path.stem}_student.pth')
    file = save(student, out)
    num, all_ = len(student['state_dict']), len(checkpoint['state_dict'])
    loads = f', loads strictly into {args.config}' if args.config else ''
    print(f'{file}: {num} tensors of the student, {all_ - num} left out{loads}')
    if args.config:
        parts = {k: v for k, v in cfg.to_dict().items() if k in FOR_TESTING}
        Config(parts).dump(file.with_suffix('.py'))
        print(f'{file.with_suffix(".py")}: the config for testing and inference')


if __name__ == '__main__':
    main()

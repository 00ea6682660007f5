"""Export the student of a distillation checkpoint: what its own config loads strictly.

Left out are what was learned to distil (`distill.*`), the optimizer and the logs; of a
model with EMA it is the averaged weights. The file's name ends in the first 8 digits of
its sha256, as those of the model zoos do.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import OrderedDict
from pathlib import Path

import torch
from mmengine.registry import DefaultScope

from mmdist.checkpoint import load_checkpoint
from mmdist.registry import MODELS
from mmdist.teachers.teacher import load_config

PREFIX = 'distill.'
# Not among them: the distillation config and the names of files where it was trained.
META = ('dataset_meta', 'epoch', 'iter', 'mmengine_version')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--out', help='path of the result, before the digits; <checkpoint>_student.pth'
    )
    parser.add_argument(
        '--config',
        help="the student's config, or the distillation config: checks that the result "
        'loads strictly',
    )
    parser.add_argument(
        '--weights-only',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='read the checkpoint safely; the other may run code that is in the file',
    )
    return parser.parse_args()


def student_of(checkpoint: dict) -> dict:
    """The part of a checkpoint that is the plain student's.

    Args:
        checkpoint: As mmengine's Runner saves it. With EMAHook, its ``state_dict``
            holds the averaged weights already.

    Returns:
        ``state_dict`` and ``meta``.

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


def check(student: dict, config: str) -> None:
    """Load strictly into the config's model.

    Raises:
        RuntimeError: A key is missing, unexpected or of another shape.
    """
    cfg = load_config(config)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = MODELS.build(cfg.model)
    model.load_state_dict(student['state_dict'], strict=True)


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
    if args.config:
        check(student, args.config)
    path = Path(args.checkpoint)
    out = Path(args.out) if args.out else path.with_name(f'{path.stem}_student.pth')
    file = save(student, out)
    num, all_ = len(student['state_dict']), len(checkpoint['state_dict'])
    loads = f', loads strictly into {args.config}' if args.config else ''
    print(f'{file}: {num} tensors of the student, {all_ - num} left out{loads}')


if __name__ == '__main__':
    main()

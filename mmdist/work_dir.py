"""What an earlier run left in a work_dir: resumed if whole, not mixed with another."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdist.checkpoint import load_checkpoint, load_strictly

# Settings that may change between two runs of one experiment.
_OF_THE_RUN = (
    'env_cfg', 'launcher', 'load_from', 'log_level', 'resume', 'work_dir'
)  # fmt: skip


def last_whole_checkpoint(work_dir: str | Path) -> tuple[str, dict] | None:
    """Find the last checkpoint that a run can be resumed from.

    mmengine does not write checkpoints atomically: a run that is killed, or a disk that
    is full, leaves a file that is cut off. What cannot be read is named in a warning
    and passed over. The order is that of mmengine, the one that ``last_checkpoint``
    names, and then the others, the newest first.

    Args:
        work_dir: Where an earlier run saved its checkpoints.

    Returns:
        Path and content of the checkpoint; None if there is none in ``work_dir``.

    Raises:
        RuntimeError: There are checkpoints, but none can be read.
    """
    work_dir = Path(work_dir)
    paths = sorted(
        work_dir.glob('*.pth'), key=lambda x: x.exists() and -x.stat().st_mtime
    )
    note = work_dir / 'last_checkpoint'
    named = note.read_text(errors='replace').strip() if note.is_file() else ''
    if named:
        paths.sort(key=lambda path: path.name != Path(named).name)  # stable
    damaged = []
    for path in paths:
        try:
            checkpoint = load_checkpoint(str(path))
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            print_log(f'Passed over: {error}', level=logging.WARNING)
            # not of a text, a folder, a dangling link or something that is no run's
            if isinstance(error, RuntimeError) and _began_as_one(path):
                damaged.append(str(path))
            continue
        # others are weights alone, an exported student for instance
        if checkpoint.get('meta') and {'message_hub', 'state_dict'} <= {*checkpoint}:
            return str(path), checkpoint
    if damaged:
        raise RuntimeError(
            f'No checkpoint in {str(work_dir)!r} can be read: {", ".join(damaged)}. '
            'Resume from another, `--resume PATH`, or train into another --work-dir.'
        )
    return None


def _began_as_one(path: Path) -> bool:
    with path.open('rb') as file:
        return file.read(2) in (b'', b'PK', b'\x80\x02')  # torch's formats


def refuse_other_config(
    cfg: Config, checkpoint: dict, path: str, or_same: bool = False
) -> None:
    """Stop before a run is mixed with another one in its work_dir, or overwritten.

    Args:
        cfg: The config to train.
        checkpoint: A checkpoint of the earlier run.
        path: Where it lies.
        or_same: Refuse the same config as well.

    Raises:
        RuntimeError: It names what differs.
    """
    theirs, ours = (
        _settings(text) for text in (checkpoint['meta'].get('cfg'), cfg.pretty_text)
    )
    differing = sorted(
        key
        for key in (theirs.keys() | ours.keys()) - set(_OF_THE_RUN)
        if theirs and theirs.get(key) != ours.get(key)
    )
    if differing or or_same:
        why = f'another config (these differ: {", ".join(differing)})'
        raise RuntimeError(
            f'{path!r} was trained with {why if differing else "this config"}, and its '
            'run would be mixed with this one or overwritten. Train into another '
            '--work-dir, remove this one, or go on with its weights, --resume.'
        )


def _settings(text: str | None) -> dict[str, str]:
    """The text of each setting; mmengine sorts them, and only line breaks may vary."""
    _, *parts = re.split(
        r'^(\w+) ?= ?', text if isinstance(text, str) else '', flags=re.M
    )
    values = (re.sub(r'\s+', '', value) for value in parts[1::2])
    return dict(zip(parts[::2], values, strict=True))


def check_fits(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Stop before a run is resumed with the weights of another model, or broken ones.

    mmengine resumes leniently: what does not fit keeps its random values. The weights
    are loaded, as they will be.

    Raises:
        RuntimeError: Keys or shapes differ; it lists up to ten of each sort.
    """
    advice = (
        'The run cannot be resumed with this model. Resume with the config that it was '
        'trained with. To start anew from its weights, set `load_from`.'
    )
    load_strictly(model, checkpoint, path, 'the model of this config', advice)

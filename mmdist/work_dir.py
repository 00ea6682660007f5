"""What an earlier run left in a work_dir: resume it if intact, never mix two runs."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdist.checkpoint import load_checkpoint, load_strictly

# Settings that may change between two runs of one experiment.
_OF_THE_RUN = {'env_cfg', 'launcher', 'load_from', 'log_level', 'resume', 'work_dir'}


def last_whole_checkpoint(work_dir: str | Path) -> tuple[str, dict] | None:
    """Path and content of the last checkpoint that a run can be resumed from, or None.

    mmengine does not write checkpoints atomically: a killed run or a full disk leaves a
    truncated file. A file that cannot be read is skipped with a warning that names it.
    As in mmengine, the one that ``last_checkpoint`` names comes first; then come the
    others, newest first.

    Raises:
        RuntimeError: There are checkpoints, but none can be read.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    named = Path(note.read_text(errors='replace').strip() if note.is_file() else '')
    damaged = []
    for path in sorted(
        work_dir.glob('*.pth'),
        key=lambda x: (x.name != named.name, x.exists() and -x.stat().st_mtime),
    ):
        try:
            checkpoint = load_checkpoint(str(path))
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            print_log(f'Skipped: {error}', level=logging.WARNING)
            # texts, folders, dangling links and files that no run wrote do not count
            if isinstance(error, RuntimeError) and _began_as_one(path):
                damaged.append(str(path))
            continue
        # others hold only weights, for instance an exported student
        if checkpoint.get('meta') and {'message_hub', 'state_dict'} <= {*checkpoint}:
            return str(path), checkpoint
    if damaged:
        raise RuntimeError(
            f'No checkpoint in {str(work_dir)!r} can be read: {", ".join(damaged)}. '
            'Resume from another with `--resume PATH`, or choose another --work-dir.'
        )
    return None


def _began_as_one(path: Path) -> bool:
    with path.open('rb') as file:
        return file.read(2) in (b'', b'PK', b'\x80\x02')  # torch's formats


def refuse_other_config(
    cfg: Config, checkpoint: dict, path: str, or_same: bool = False
) -> None:
    """Raise an error before a run of ``cfg`` overwrites or mixes with an earlier one.

    ``checkpoint``, at ``path``, is of the earlier run in the work_dir.

    Raises:
        RuntimeError: The configs differ (it says where), or ``or_same`` is set.
    """
    theirs = _settings(checkpoint['meta'].get('cfg'))
    ours = _settings(cfg.pretty_text)
    changed = {key for key, _ in theirs.items() ^ ours.items()} if theirs else set()
    differing = sorted(changed - _OF_THE_RUN)
    if differing or or_same:
        why = f'another config (these differ: {", ".join(differing)})'
        raise RuntimeError(
            f'{path!r} was trained with {why if differing else "this config"}, and its '
            'run would be mixed with this one or overwritten. Choose another '
            '--work-dir, delete this one, or continue from its weights with --resume.'
        )


def _settings(text: str | None) -> dict[str, str]:
    """The text of each setting; mmengine sorts them, so only line breaks can vary."""
    text = text if isinstance(text, str) else ''
    _, *parts = re.split(r'^(\w+) ?= ?', text, flags=re.M)
    values = (re.sub(r'\s+', '', value) for value in parts[1::2])
    return dict(zip(parts[::2], values, strict=True))


def check_fits(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load the weights strictly, before a run resumes with them.

    mmengine resumes leniently: weights that do not fit keep their random values.

    Raises:
        RuntimeError: Keys, shapes or values are wrong, see :func:`load_strictly`.
    """
    advice = (
        'The run cannot be resumed with this model. Resume with the config that it was '
        'trained with. To start anew from its weights, set `load_from`.'
    )
    load_strictly(model, checkpoint, path, 'the model of this config', advice)

"""What an earlier run left in a work_dir: resumed if whole, not mixed with another."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdist.checkpoint import load_checkpoint

# Settings that may change between two runs of one experiment.
_OF_THE_RUN = (
    'env_cfg', 'launcher', 'load_from', 'log_level', 'resume', 'work_dir'
)  # fmt: skip


def last_whole_checkpoint(work_dir: str | Path) -> tuple[str, dict] | None:
    """Find the last checkpoint that a run can be resumed from.

    mmengine does not write checkpoints atomically: a run that is killed, or a disk that
    is full, leaves a file that is cut off. Such files are named in a warning and passed
    over. The order is that of mmengine, the one that ``last_checkpoint`` names, and
    then the others, the newest first.

    Args:
        work_dir: Where an earlier run saved its checkpoints.

    Returns:
        Path and content of the checkpoint; None if there is none in ``work_dir``.

    Raises:
        RuntimeError: There are checkpoints, but none can be read.
    """
    work_dir = Path(work_dir)
    paths = sorted(
        work_dir.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True
    )
    note = work_dir / 'last_checkpoint'
    named = note.read_text().strip() if note.is_file() else ''
    if named:
        paths.sort(key=lambda path: path.name != Path(named).name)  # stable
    damaged = []
    for path in paths:
        try:
            checkpoint = load_checkpoint(str(path))
        except RuntimeError as error:
            print_log(f'Passed over: {error}', level=logging.WARNING)
            damaged.append(str(path))
            continue
        # others are weights alone, an exported student for instance
        if {'meta', 'message_hub', 'state_dict'} <= checkpoint.keys():
            return str(path), checkpoint
    if damaged:
        raise RuntimeError(
            f'No checkpoint in {str(work_dir)!r} can be read: {", ".join(damaged)}. '
            'Resume from another, `--resume PATH`, or train into another --work-dir.'
        )
    return None


def refuse_other_config(cfg: Config, checkpoint: dict, path: str) -> None:
    """Stop before the checkpoints of two experiments are mixed in one work_dir.

    Args:
        cfg: The config to train.
        checkpoint: A checkpoint of the earlier run.
        path: Where it lies.

    Raises:
        RuntimeError: The earlier run had another config; it names what differs.
    """
    text = checkpoint['meta'].get('cfg')
    if not text:
        return
    theirs, ours = (_settings(text) for text in (text, cfg.pretty_text))
    differing = sorted(
        key
        for key in (theirs.keys() | ours.keys()) - set(_OF_THE_RUN)
        if theirs.get(key) != ours.get(key)
    )
    if differing:
        raise RuntimeError(
            f'{path!r} was trained with another config (these differ: '
            f'{", ".join(differing)}), and its run would be mixed with this one or '
            'overwritten. Train into another --work-dir, remove this one, or go on '
            'with its weights, --resume.'
        )


def _settings(text: str) -> dict:
    """The settings in the text of a config, which is read and not run."""
    return {
        target.id: _value(statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _value(node: ast.expr) -> Any:
    """A literal's value, ``dict(...)`` included; of anything else its structure."""
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=items):
            return {item.arg: _value(item.value) for item in items}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {
                ast.literal_eval(key): _value(value)
                for key, value in zip(keys, values, strict=True)
            }
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.dump(node)


def check_fits(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Stop before a run is resumed with the weights of another model.

    mmengine resumes leniently: what does not fit keeps its random values.

    Args:
        model: The model, not wrapped.
        checkpoint: What is to be resumed.
        path: Where it lies.

    Raises:
        RuntimeError: Keys or shapes differ; it lists up to ten.
    """
    theirs, ours = (
        {key.removeprefix('module.'): tuple(value.shape) for key, value in x.items()}
        for x in (checkpoint['state_dict'], model.state_dict())
    )
    problems = [
        f'{key}: {theirs.get(key, "missing")} in the file, '
        f'{ours.get(key, "missing")} in the model'
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if problems:
        listed = '\n    '.join(problems[:10])
        more = f'\n    ... and {len(problems) - 10} more' * (len(problems) > 10)
        raise RuntimeError(
            f'The run of {path!r} cannot be resumed with this model, {len(problems)} '
            f'weights do not fit:\n    {listed}{more}\nResume with the config that it '
            'was trained with. To start anew from its weights, set `load_from`.'
        )

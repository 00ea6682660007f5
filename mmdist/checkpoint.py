"""Checkpoints, read safely and loaded strictly."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import CheckpointLoader
from torch import nn


def load_checkpoint(path: str, weights_only: bool = True) -> dict:
    """Read a checkpoint with torch's safe loader.

    Args:
        path: Path or URL, whatever mmengine's ``CheckpointLoader`` reads.
        weights_only: False lets the file run code.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, or cannot be read safely.
    """
    try:
        with _loader_forced(weights_only):
            return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except FileNotFoundError:
        raise FileNotFoundError(
            f'The checkpoint {path!r} does not exist. Relative paths count from the '
            f'working directory, {os.getcwd()!r}.'
        ) from None
    except pickle.UnpicklingError as error:
        if weights_only and 'global' in str(error).lower():
            raise RuntimeError(
                f'The checkpoint {path!r} holds objects that the safe loader does not '
                'read: reading them could run code of its author. If you trust the '
                'file, set `teacher.weights_only=False` (a tool: --no-weights-only). '
                f'The loader says: {error}'
            ) from error
        raise RuntimeError(_DAMAGED.format(path, error)) from error
    except (EOFError, RuntimeError) as error:
        raise RuntimeError(_DAMAGED.format(path, error)) from error


_DAMAGED = (
    'The checkpoint {!r} cannot be read: it is damaged, cut off or no checkpoint at '
    'all. Download it again. The loader says: {}'
)


@contextmanager
def _loader_forced(weights_only: bool) -> Iterator[None]:
    """Decide for every ``torch.load`` below, whichever way mmengine calls it."""
    names = ['TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD']
    before = {name: os.environ.pop(name, None) for name in names}  # not both, for torch
    os.environ[names[not weights_only]] = '1'
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def load_strictly(
    model: nn.Module,
    checkpoint: dict,
    path: str,
    model_name: str = "the teacher's config",
    advice: str = 'Check that `teacher.config` is the very config this checkpoint was '
    'trained with (backbone, depth, neck, number of classes).',
) -> None:
    """Load weights; any missing, unexpected or mis-shaped key is an error.

    Args:
        model: The model to fill.
        checkpoint: A checkpoint with a ``state_dict``, or a state dict.
        path: Where it came from, for the message.
        model_name: What the weights should fit, for the message.
        advice: What to do if they do not, for the message.

    Raises:
        RuntimeError: It lists up to ten keys of each sort. Or a weight is not finite.
    """
    state = checkpoint.get('state_dict', checkpoint)
    prefix = 'module.'  # saved from within DistributedDataParallel
    if state and all(key.startswith(prefix) for key in state):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    missing, unexpected, errors = [], [], []
    metadata = getattr(state, '_metadata', {})
    state = dict(state)

    def load(module: nn.Module, prefix: str = '') -> None:
        # As torch's load_state_dict, which lists no keys once a shape is wrong. It runs
        # the models' own conversions of older checkpoints.
        module._load_from_state_dict(
            state,
            prefix,
            metadata.get(prefix[:-1], {}),
            True,
            missing,
            unexpected,
            errors,
        )
        for name, child in module.named_children():
            load(child, f'{prefix}{name}.')

    load(model)
    problems = {
        'missing in the file': missing,
        'in the file, but not in the model': sorted(set(unexpected)),
        'of another shape': [' '.join(error.split()) for error in errors],
    }
    if any(problems.values()):
        lines = [f'The weights in {path!r} do not fit {model_name}.']
        for what, keys in problems.items():
            if keys:
                lines.append(f'{len(keys)} {what}:')
                lines += [f'    {key}' for key in keys[:10]]
                lines += [f'    ... and {len(keys) - 10} more'] * (len(keys) > 10)
        raise RuntimeError('\n'.join([*lines, advice]))
    broken = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise RuntimeError(
            f'The weights in {path!r} are broken: {len(broken)} of them hold NaN or '
            f'infinite values ({", ".join(broken[:10])}). Its training diverged; take '
            'an earlier checkpoint of it.'
        )

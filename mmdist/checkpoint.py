"""Checkpoints, read safely and loaded strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import checkpoint as loaders
from torch import nn

from ._stand_ins import safely


def read(path: str, map_location: Any = 'cpu', weights_only: bool = True) -> Any:
    """Read a file as mmengine's ``CheckpointLoader`` does; by default, safely.

    mmengine's functions do not pass ``weights_only``, and the onedl fork's fall back to
    unsafe loading. So they are run with replacements for torch's functions.
    """
    load, load_url = (
        partial(safely, f) if weights_only else partial(f, weights_only=False)
        for f in (torch.load, loaders.load_url)
    )
    names = {
        **vars(loaders),
        'torch': SimpleNamespace(load=load, distributed=torch.distributed),
        'load_url': load_url,
        '_safe_torch_load': load,
    }
    for name, f in vars(loaders).items():
        if name.startswith('load_from_'):
            names[name] = FunctionType(f.__code__, names, name, f.__defaults__)
    found = loaders.CheckpointLoader._get_checkpoint_loader(path)
    print_log(f'Loads checkpoint by {found.__name__[10:]} backend: {path}', 'current')
    return names.get(found.__name__, found)(path, map_location)


def load_checkpoint(path: str, weights_only: bool = True) -> dict:
    """Read a checkpoint with torch's safe loader, and check its content.

    ``path`` is anything that mmengine's ``CheckpointLoader`` reads.
    ``weights_only=False`` lets the file run code.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, or cannot be read safely.
        ValueError: It is not a dict of weights, or its class names are not a list.
    """
    try:
        checkpoint = read(path, weights_only=weights_only)
    except FileNotFoundError:
        raise FileNotFoundError(
            f'The checkpoint {path!r} is a folder.'
            if os.path.isdir(path)
            else f'The checkpoint {path!r} does not exist. Relative paths start at the '
            f'working directory, {os.getcwd()!r}.'
        ) from None
    except (OSError, ImportError) as error:
        text = f'The checkpoint {path!r} cannot be read: {error}'
        raise RuntimeError(text) from error
    except Exception as error:  # torch's reader can raise anything on a text file
        cause = error.__context__ or error  # without torch's advice
        said = ' '.join(f'{type(cause).__name__}: {cause}'.split())[:300]
        text = (
            f'The checkpoint {path!r} cannot be read: it is damaged, truncated or not '
            'a checkpoint. Download it again.'
        )
        if 'GLOBAL' in said or 'add_safe_globals' in said:
            unset = '' if weights_only else ' and unset TORCH_FORCE_WEIGHTS_ONLY_LOAD'
            text = (
                f'The checkpoint {path!r} contains objects that the safe loader '
                'refuses: reading them could run code from the file. If you trust it, '
                'set `teacher.weights_only=False` (in a tool: --no-weights-only)'
                f'{unset}.'
            )
        raise RuntimeError(f'{text} The loader says: {said}') from error
    _check_content(checkpoint, path)
    return checkpoint


def _check_content(checkpoint: Any, path: str) -> None:
    def check(value: Any, what: str, kind: Any = Mapping) -> Any:
        if not isinstance(value, kind) or not all(isinstance(x, str) for x in value):
            wanted = 'dict with names as keys' if kind is Mapping else 'list of names'
            raise ValueError(
                f'{path!r} is not a usable checkpoint: {what} must be a {wanted}, got '
                f'{type(value).__name__}.'
            )
        return value

    if 'state_dict' not in check(checkpoint, 'its content'):
        return
    check(checkpoint['state_dict'], '`state_dict`')
    meta = {} if checkpoint.get('meta') is None else check(checkpoint['meta'], '`meta`')
    data = meta.get('dataset_meta')
    data = {} if data is None else check(data, '`dataset_meta`')
    for key, value in (*meta.items(), *data.items()):
        if key.lower() == 'classes' and value is not None:
            check(value, f'`{key}`', (str, list, tuple))


def check_finite(state: Mapping[str, Any], path: str) -> None:
    """Raise RuntimeError, with up to ten keys, if weights are NaN or infinite."""
    broken = [
        key
        for key, value in state.items()
        if torch.is_tensor(value) and not value.isfinite().all()
    ]
    if broken:
        raise RuntimeError(
            f'The weights in {path!r} are broken: {len(broken)} of them contain NaN or '
            f'infinite values ({", ".join(broken[:10])}). The training diverged; use '
            'an earlier checkpoint.'
        )


def load_strictly(
    model: nn.Module,
    checkpoint: dict,
    path: str,
    model_name: str = "the teacher's config",
    advice: str = 'Check that `teacher.config` is the config that this checkpoint was '
    'trained with (backbone, depth, neck, number of classes).',
) -> None:
    """Load a checkpoint, or a state dict, into a model; all keys must fit.

    The error says that the weights in ``path`` do not fit ``model_name``, and ends with
    ``advice``.

    Raises:
        RuntimeError: Keys are missing, unexpected or of another shape (it lists up to
            ten of each sort), or a weight is not finite or not a dense tensor of
            floating-point numbers.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if all(key.startswith('module.') for key in state):  # saved from within DDP
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    missing, unexpected, errors = [], [], []
    metadata = getattr(state, '_metadata', {})
    state = dict(state)
    types = [
        f'{key}: {found.dtype}, {found.layout}'
        for key, value in model.state_dict().items()
        if torch.is_tensor(found := state.get(key))
        and (
            value.is_floating_point() > found.is_floating_point()
            or found.layout != torch.strided
            or found.is_nested
            or found.is_meta
        )
    ]

    def load(module: nn.Module, prefix: str = '') -> None:
        # Like torch's load_state_dict, which returns no keys if a shape is wrong. This
        # runs the models' own conversions of older checkpoints.
        args = state, prefix, metadata.get(prefix[:-1], {}), True
        module._load_from_state_dict(*args, missing, unexpected, errors)
        for name, child in module.named_children():
            load(child, f'{prefix}{name}.')

    if not types:
        load(model)
    problems = {
        'missing in the file': missing,
        'in the file, but not in the model': sorted(set(unexpected)),
        'of another shape': [' '.join(error.split()) for error in errors],
        'of a type that weights cannot have': types,
    }
    if any(problems.values()):
        lines = [f'The weights in {path!r} do not fit {model_name}.']
        for what, keys in problems.items():
            if keys:
                lines.append(f'{len(keys)} {what}:')
                lines += [f'    {key}' for key in keys[:10]]
                lines += [f'    ... and {len(keys) - 10} more'] * (len(keys) > 10)
        raise RuntimeError('\n'.join([*lines, advice]))
    check_finite(model.state_dict(), path)

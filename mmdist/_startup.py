"""Two things that mmengine lacks, put in place before mmdist is imported.

Config paths ``mmdist::...``: mmengine resolves ``package::path`` through the table
``mmengine.config.utils.MODULE2PACKAGE``. When a training script of mmdet or mmseg
reads ``_base_ = 'mmdist::det/...'``, nothing has imported mmdist yet.

Checkpoints: torch >= 2.6 reads only classes that were declared harmless, and mmengine
0.10 does not declare those of its own checkpoints, so its loader refuses them. A
student's checkpoint must load in the plain student's config, with ``init_detector`` or
mmdet's own ``tools/test.py``, and these never import mmdist. So mmengine's loader
declares mmengine's classes while it reads a file. Nothing else is changed:
``torch.load`` knows these classes neither before nor after.

The wheel also installs this file as the top-level module ``_mmdist_startup``, and
``mmdist.pth`` imports it at each start of the interpreter. It must therefore stay
cheap, use the standard library only, and never raise.
"""

from __future__ import annotations

import contextlib
import sys


def prepare_mmengine() -> None:
    """Complete each module of mmengine, at once or at the moment it gets loaded.

    Calling it again is harmless.
    """
    for name, complete in _COMPLETIONS.items():
        if name in sys.modules:
            complete(sys.modules[name])
    if not any(getattr(f, 'is_of_mmdist', False) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """A meta path finder that waits for the modules to complete."""

    is_of_mmdist = True  # this file is imported under two names, with a class each

    def find_spec(self, name, path=None, target=None):
        if name not in _COMPLETIONS or name in sys.modules:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_complete(module):
                exec_module(module)
                with contextlib.suppress(Exception):
                    _COMPLETIONS[name](module)

            spec.loader.exec_module = exec_and_complete
        return spec


def _complete_packages(utils) -> None:
    """Add mmdist to the table, and fix entries that another distribution provides."""
    table = utils.MODULE2PACKAGE
    # No distribution is called 'mmdist.version', so mmengine takes the directory of
    # that module, where `.mim` lies, in an editable install too.
    table['mmdist'] = 'mmdist.version'
    for module, package in table.items():
        # The onedl fork and bare checkouts provide `mmseg` without a distribution
        # 'mmsegmentation'; mmengine then finds no config, and mmengine.hub would
        # install upstream over the fork. All these libraries have a version.py.
        try:
            if '.' not in package and _exists(module) and not _is_known(package):
                table[module] = f'{module}.version'
        except Exception:  # an oddly installed package is none of our business
            continue


def _exists(module: str) -> bool:
    from importlib.util import find_spec

    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _is_known(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(package))
    except PackageNotFoundError:
        return _exists(package)


def _read_own_checkpoints(checkpoint) -> None:
    """Let mmengine's loader read what mmengine's checkpoints hold."""
    import torch

    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        return  # reads everything
    loader = checkpoint.CheckpointLoader
    if getattr(loader.load_checkpoint, 'is_of_mmdist', False):
        return
    if hasattr(checkpoint, 'get_torch_safe_globals'):
        # The onedl fork declares a list of its own around each load, and it holds the
        # real getattr.
        checkpoint.get_torch_safe_globals = list
    load = loader.load_checkpoint.__func__

    def load_checkpoint(cls, *args, **kwargs):
        with torch.serialization.safe_globals(_harmless()):
            return load(cls, *args, **kwargs)

    load_checkpoint.__doc__ = load.__doc__
    load_checkpoint.is_of_mmdist = True
    loader.load_checkpoint = classmethod(load_checkpoint)


def _harmless() -> list:
    """What mmengine's checkpoints hold: logs, which are numpy arrays inside."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        HistoryBuffer,
        slice,
        (_history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        # numpy 1 and 2 name the module of these two differently.
        (reconstruct, 'numpy.core.multiarray._reconstruct'),
        (reconstruct, 'numpy._core.multiarray._reconstruct'),
        (scalar, 'numpy.core.multiarray.scalar'),
        (scalar, 'numpy._core.multiarray.scalar'),
        *{type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'},
    ]


def _history_method(owner: type, name: str) -> object:
    """Stands for ``getattr`` in the safe loader, which must not have the real one.

    A ``HistoryBuffer`` holds references to its own methods; nothing else is given out.
    """
    from pickle import UnpicklingError

    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise UnpicklingError(f'{owner!r}.{name} is not available to a file')
    return getattr(owner, name)


_COMPLETIONS = {
    'mmengine.config.utils': _complete_packages,
    'mmengine.runner.checkpoint': _read_own_checkpoints,
}

if __name__ == '_mmdist_startup':
    prepare_mmengine()

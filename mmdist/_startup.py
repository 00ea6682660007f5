"""Patches for mmengine and mmdet, applied when their modules are imported.

The wheel also installs this file as the top-level module ``_mmdist_startup``, and
``mmdist.pth`` imports it whenever the interpreter starts: a training script of mmdet or
mmseg reads ``_base_ = 'mmdist::det/...'`` before anything has imported mmdist. So it
must cost next to nothing (it imports only ``sys``) and never raise.
"""

import sys


def prepare_mmengine() -> None:
    """Patch each module, now or when it is imported; repeated calls are harmless."""
    if not any(getattr(f, 'is_of_mmdist', False) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        for name, complete in _COMPLETIONS.items():
            if name in sys.modules:
                complete(sys.modules[name])


class _Finder:
    """A meta path finder that patches the modules when they are imported."""

    is_of_mmdist = True  # not `isinstance`: this file has two names, so two classes

    def find_spec(self, name, path=None, target=None):
        if name not in _COMPLETIONS or name in sys.modules:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_complete(module):
                exec_module(module)
                try:  # noqa: SIM105  (contextlib would be most of the cost)
                    _COMPLETIONS[name](module)
                except Exception:
                    pass

            spec.loader.exec_module = exec_and_complete
        return spec


def _complete_packages(utils) -> None:
    """Add mmdist to the table, and fix packages that another distribution provides."""
    table = utils.MODULE2PACKAGE
    # No distribution is called 'mmdist.version', so mmengine uses the directory of
    # that module, which contains `.mim`, even in an editable install.
    table['mmdist'] = 'mmdist.version'
    for module, package in table.items():
        # The onedl fork and bare checkouts provide `mmseg` without a distribution
        # 'mmsegmentation'; mmengine then finds no config, and mmengine.hub would
        # install upstream over the fork. All these libraries have a version.py.
        try:
            missing = '.' not in package and not _is_installed(package)
            if missing and _is_installed(module):
                table[module] = f'{module}.version'
        except Exception:  # an oddly installed package is not our concern
            continue


def _is_installed(name: str) -> bool:
    """Whether a distribution or a module has this name, as in mmengine."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return getattr(find_spec(name), 'origin', None) is not None


def _read_own_checkpoints(checkpoint) -> None:
    """Let mmengine's loader read mmengine's own checkpoints.

    torch >= 2.6 loads only classes that are declared safe, and mmengine 0.10 does not
    declare its own. A student's checkpoint must load in ``init_detector`` and mmdet's
    ``tools/test.py``, which never import mmdist. So mmdist reads a file that torch
    refuses, just as safely; if mmdist refuses it too, torch's error is raised. The
    onedl fork can read these checkpoints and is left alone.
    """
    if hasattr(checkpoint, 'get_torch_safe_globals'):
        return
    from pickle import UnpicklingError

    loader = checkpoint.CheckpointLoader
    load = loader.load_checkpoint.__func__

    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        try:
            return load(cls, filename, map_location, logger)
        except UnpicklingError as error:
            try:
                from mmdist.checkpoint import read

                return read(filename, map_location)
            except Exception:
                raise error from None

    load_checkpoint.__doc__ = load.__doc__
    loader.load_checkpoint = classmethod(load_checkpoint)


def _take_the_student(inference) -> None:
    """Let ``init_detector``, which reads the backbone, take a distillation config."""
    from copy import deepcopy
    from functools import wraps

    init = inference.init_detector

    @wraps(init)
    def init_detector(config, *args, **kwargs):
        if isinstance(config, (str, inference.Path)):
            config = inference.Config.fromfile(config)
        model = config.get('model') or {}
        if str(model.get('type')).startswith('mmdist.') and 'student' in model:
            config = deepcopy(config)
            config.model = config.model.student
        return init(config, *args, **kwargs)

    inference.init_detector = init_detector


_COMPLETIONS = {
    'mmengine.config.utils': _complete_packages,
    'mmengine.runner.checkpoint': _read_own_checkpoints,
    'mmdet.apis.inference': _take_the_student,
}

if __name__ == '_mmdist_startup':
    prepare_mmengine()

"""What mmengine and mmdet lack, put in place when their modules are imported.

The wheel also installs this file as the top-level module ``_mmdist_startup``, and
``mmdist.pth`` imports it at each start of the interpreter: before a training script of
mmdet or mmseg reads ``_base_ = 'mmdist::det/...'``, nothing has imported mmdist. It
must therefore cost next to nothing (no import but ``sys``) and never raise.
"""

import sys


def prepare_mmengine() -> None:
    """Complete each module, at once or when it is imported; again is harmless."""
    if not any(getattr(f, 'is_of_mmdist', False) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        for name, complete in _COMPLETIONS.items():
            if name in sys.modules:
                complete(sys.modules[name])


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
                try:  # noqa: SIM105  (contextlib would be most of the cost)
                    _COMPLETIONS[name](module)
                except Exception:
                    pass

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
    """Let mmengine's loader read what mmengine's own checkpoints hold.

    torch >= 2.6 reads only classes that are declared harmless, and mmengine 0.10 does
    not declare its own. A student's checkpoint must load in ``init_detector`` or
    mmdet's ``tools/test.py``, which never import mmdist. So a file that torch refuses
    is read by mmdist, as safely; what mmdist refuses too stays refused by torch's
    error. The onedl fork reads these checkpoints and is left alone.
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
    """Let ``init_detector`` read a distillation config: it asks for its backbone."""
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

"""Makes ``mmdist::...`` config paths known to mmengine before mmdist is imported.

mmengine resolves ``package::path`` through the table
``mmengine.config.utils.MODULE2PACKAGE``. When a training script of mmdet or mmseg
reads ``_base_ = 'mmdist::det/...'``, nothing has imported mmdist yet. So the wheel
also installs this file as the top-level module ``_mmdist_startup``, and
``mmdist.pth`` imports it at each start of the interpreter. It must therefore stay
cheap, use the standard library only, and never raise.
"""

from __future__ import annotations

import sys

_TABLE_MODULE = 'mmengine.config.utils'


def register_packages() -> None:
    """Complete mmengine's table of packages that may stand before ``::``.

    Completes it at once where mmengine's table is loaded, else at the moment it
    gets loaded. Calling it again is harmless.
    """
    module = sys.modules.get(_TABLE_MODULE)
    if module is not None and hasattr(module, 'MODULE2PACKAGE'):
        _complete(module.MODULE2PACKAGE)
    elif not any(type(f).__name__ == _TableFinder.__name__ for f in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder:
    """A meta path finder that waits for mmengine's table, then steps aside."""

    def find_spec(self, name, path=None, target=None):
        if name != _TABLE_MODULE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, exec_module = spec.loader, spec.loader.exec_module

            def exec_and_complete(module):
                exec_module(module)
                _complete(getattr(module, 'MODULE2PACKAGE', {}))

            loader.exec_module = exec_and_complete
        return spec


def _complete(table: dict[str, str]) -> None:
    """Add mmdist, and mend the entries that another distribution provides."""
    # No distribution is called 'mmdist.registry', so mmengine takes the directory
    # of that module, where `.mim` lies, in an editable install too.
    table['mmdist'] = 'mmdist.registry'
    for module, package in table.items():
        # The onedl fork and bare checkouts provide `mmseg` without a distribution
        # 'mmsegmentation'; mmengine then finds no config, and mmengine.hub would
        # install upstream over the fork. The module's directory serves there too.
        try:
            if '.' not in package and _exists(module) and not _is_known(package):
                table[module] = f'{module}.registry'
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


if __name__ == '_mmdist_startup':
    register_packages()

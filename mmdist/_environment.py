"""Checks of the libraries that mmdist needs."""

from __future__ import annotations

import importlib.util

import mmengine
from mmengine.utils import digit_version

# RuntimeErrors here, since mmengine's registries swallow ImportErrors.
HINT = "Run `python tools/check_env.py` in mmdist's checkout: it prints how to fix it."


def check_versions() -> None:
    """Raise an error if mmengine is too old; called at import.

    Raises:
        RuntimeError: mmengine is older than 0.10.
    """
    if digit_version(mmengine.__version__) < digit_version('0.10.0'):
        raise RuntimeError(
            f'mmdist needs mmengine >= 0.10, found {mmengine.__version__}. {HINT}'
        )


def check_ops() -> None:
    """Raise an error if mmcv or its ops are missing; called before building models.

    Raises:
        RuntimeError: mmcv is not installed, or was built without its compiled ops.
    """
    if importlib.util.find_spec('mmcv') is None:
        raise RuntimeError(f'mmdist needs mmcv, which is not installed. {HINT}')
    if importlib.util.find_spec('mmcv._ext') is None:
        raise RuntimeError(f'mmcv is installed without its compiled ops. {HINT}')

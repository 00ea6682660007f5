"""Checks of the libraries that mmdist needs."""

from __future__ import annotations

import importlib.util

import mmengine
from mmengine.utils import digit_version

# RuntimeErrors here, since mmengine's registries swallow ImportErrors.
HINT = "Run `python tools/check_env.py` in mmdist's checkout: it prints how to fix it."


def check_versions() -> None:
    """Raise RuntimeError if mmengine is older than 0.10; called at import."""
    if digit_version(mmengine.__version__) < digit_version('0.10.0'):
        raise RuntimeError(
            f'mmdist needs mmengine >= 0.10, found {mmengine.__version__}. {HINT}'
        )


def check_ops() -> None:
    """Raise RuntimeError if mmcv or its compiled ops are missing."""
    if importlib.util.find_spec('mmcv') is None:
        raise RuntimeError(f'mmdist needs mmcv, which is not installed. {HINT}')
    if importlib.util.find_spec('mmcv._ext') is None:
        raise RuntimeError(f'mmcv is installed without its compiled ops. {HINT}')

"""What mmdist asks of the libraries around it."""

from __future__ import annotations

import importlib.util

import mmengine
from mmengine.utils import digit_version

# Not ImportErrors: the registries of mmengine swallow those.
HINT = 'Run `python tools/check_env.py` of mmdist: it names the command that fixes it.'


def check_versions() -> None:
    """Stop with a sentence where mmengine is too old; at import.

    Raises:
        RuntimeError: mmengine is older than 0.10.
    """
    if digit_version(mmengine.__version__) < digit_version('0.10.0'):
        raise RuntimeError(
            f'mmdist needs mmengine >= 0.10, found {mmengine.__version__}. {HINT}'
        )


def check_ops() -> None:
    """Stop with a sentence where mmcv or its ops are missing; before models are built.

    Raises:
        RuntimeError: mmcv is not installed, or was built without its compiled ops.
    """
    if importlib.util.find_spec('mmcv') is None:
        raise RuntimeError(f'mmdist needs mmcv, which is not installed. {HINT}')
    if importlib.util.find_spec('mmcv._ext') is None:
        raise RuntimeError(f'mmcv is installed without its compiled ops. {HINT}')

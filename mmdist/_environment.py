"""What mmdist asks of the libraries around it, once, at import."""

from __future__ import annotations

import importlib.util

import mmengine
from mmengine.utils import digit_version

MENDING = (
    'Run `python tools/check_env.py` of mmdist: it names the command that mends it.'
)


def check_versions() -> None:
    """Stop with a sentence where a library is too old or was built without ops.

    Raises:
        RuntimeError: mmengine is older than 0.10 or mmcv lacks its compiled ops. (Not
            an ImportError: the registries of mmengine swallow those.)
    """
    if digit_version(mmengine.__version__) < digit_version('0.10.0'):
        raise RuntimeError(
            f'mmdist needs mmengine >= 0.10, found {mmengine.__version__}. {MENDING}'
        )
    if importlib.util.find_spec('mmcv._ext') is None:
        raise RuntimeError(f'mmcv is here without its compiled ops. {MENDING}')

"""What mmdist asks of the libraries around it, once, at import."""

from __future__ import annotations

import importlib.util

import mmengine
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

MENDING = (
    'Run `python tools/check_env.py` of mmdist: it names the command that mends it.'
)


def check_versions() -> None:
    """Stop with a sentence where a library is too old or was built without ops.

    Raises:
        RuntimeError: mmengine is older than 0.10 or mmcv lacks its compiled ops. (Not an
            ImportError: the registries of mmengine swallow those.)
    """
    if digit_version(mmengine.__version__) < digit_version('0.10.0'):
        raise RuntimeError(
            f'mmdist needs mmengine >= 0.10, found {mmengine.__version__}. {MENDING}'
        )
    if importlib.util.find_spec('mmcv._ext') is None:
        raise RuntimeError(f'mmcv is here without its compiled ops. {MENDING}')


def allow_safe_loading() -> None:
    """Let torch's safe loader (``weights_only=True``) read mmengine's checkpoints.

    A checkpoint's message hub holds ``HistoryBuffer`` objects, which are numpy arrays
    inside; without them torch >= 2.6 cannot resume a run of mmengine 0.10.
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch < 2.4
        return
    reconstruct, scalar = _numpy_pickle_functions()
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            # numpy 1 and 2 name the module of these two differently.
            (reconstruct, 'numpy.core.multiarray._reconstruct'),
            (reconstruct, 'numpy._core.multiarray._reconstruct'),
            (scalar, 'numpy.core.multiarray.scalar'),
            (scalar, 'numpy._core.multiarray.scalar'),
            *(type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'),
        ]
    )


def _numpy_pickle_functions() -> tuple:
    """The two functions by which numpy pickles arrays and scalars."""
    return np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]

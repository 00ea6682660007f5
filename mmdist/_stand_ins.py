"""Safe loading of mmengine's checkpoints, whose logs contain NumPy arrays.

Declaring ``numpy.dtype`` or ``numpy.ndarray`` to torch's safe loader would let a file
read and free memory. Instead, these names resolve to plain Python stand-ins. They check
their input, and are replaced by the real objects once the whole file is read.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import _weights_only_unpickler as unpickler

_CODES = {'b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8'}


def _check(good: bool, text: str) -> None:
    if not good:
        raise UnpicklingError(f'a GLOBAL is used in a way that is not allowed: {text}')


class _Dtype:
    def __init__(self, code: str, *_: bool) -> None:
        _check(code in _CODES, f'arrays must hold numbers, got {code!r}')
        self.real = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _check(state[1] != '>', 'big-endian numbers are not supported')


class _Array:
    real: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _check(self.real is None, 'an array has two states')
        _, shape, dtype, by_column, data = state
        good = type(dtype) is _Dtype and type(data) is bytes
        good = good and len(data) == math.prod(shape) * dtype.real.itemsize
        _check(good, 'an array and its buffer differ in size')
        numbers = np.frombuffer(data, dtype.real)
        self.real = numbers.reshape(shape, order='F' if by_column else 'C').copy()


class _History:
    real: HistoryBuffer | None = None

    def __setstate__(self, state: dict) -> None:
        # `statistics_methods` is skipped: it would apply to the whole process
        _check(self.real is None, 'a history has two states')
        names = ('_log_history', '_count_history')
        logs, counts = (state[name].real if name in state else [] for name in names)
        self.real = HistoryBuffer(logs, counts, state.get('max_length', 1_000_000))


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    array = _Array()
    array.__setstate__((1, (), dtype, False, data))
    return array.real[()]


def _method(owner: type, name: str) -> None:
    """Stand-in for ``getattr``: a history names its own methods, which are dropped."""
    good = owner is _History and name in ('min', 'max', 'current', 'mean')
    _check(good, f'getattr of {owner!r}, {name!r}')


_NAMES = {
    'builtins.bytes': lambda: b'',
    'builtins.getattr': _method,
    'builtins.slice': slice,
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
}
for _core in ('numpy.core', 'numpy._core'):  # numpy 1 and 2
    _NAMES[f'{_core}.multiarray._reconstruct'] = lambda *_: _Array()
    _NAMES[f'{_core}.multiarray.scalar'] = _scalar


def _versions(metadata: Any) -> dict[str, dict[str, int]]:
    """The module versions in a state dict's ``_metadata``, all that modules read."""
    entries = dict.items(metadata) if isinstance(metadata, dict) else ()
    found = {key: dict.get(e, 'version') for key, e in entries if isinstance(e, dict)}
    return {key: dict(version=v) for key, v in found.items() if type(v) is int}


def _replaced(value: Any, memo: dict[int, tuple]) -> Any:
    """The value, with each stand-in replaced by the object that it stands for."""
    if isinstance(value, (_Array, _History)):
        return value.real
    if type(value) not in (dict, OrderedDict, list, tuple):
        return value
    if id(value) not in memo:
        memo[id(value)] = value, value  # the first keeps it alive, so its id is unique
        if type(value) is OrderedDict:
            # attributes chosen by the file would shadow its methods
            versions = _versions(vars(value).get('_metadata'))
            vars(value).clear()
            value._metadata = versions
        if type(value) is tuple:
            memo[id(value)] = value, tuple(_replaced(item, memo) for item in value)
        else:
            for key in range(len(value)) if type(value) is list else list(value):
                value[key] = _replaced(value[key], memo)
    return memo[id(value)][1]


_thread = threading.local()
_declared = unpickler._get_user_allowed_globals


def _allowed() -> dict[str, Any]:
    return {**_declared(), **getattr(_thread, 'names', {})}


# only within `safely`: names declared to torch would apply to all threads
unpickler._get_user_allowed_globals = _allowed


def safely(load: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call one of torch's load functions with its safe loader and the stand-ins."""
    _thread.names = _NAMES
    try:
        return _replaced(load(*args, **kwargs, weights_only=True), {})
    finally:
        del _thread.names

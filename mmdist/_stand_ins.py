"""Reads mmengine's checkpoints safely: their logs hold arrays of numpy.

Torch's safe loader with ``numpy.dtype`` or ``numpy.ndarray`` declared hands a file the
means to read and to free memory. So a file gets plain Python objects under these names.
They check what they are given, and are replaced once all is read.
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
        raise UnpicklingError(f'a GLOBAL is asked for more than is allowed: {text}')


class _Dtype:
    def __init__(self, code: str, *_: bool) -> None:
        _check(code in _CODES, f'of arrays only numbers are read, not {code!r}')
        self.real = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _check(state[1] != '>', 'big-endian numbers are not read')


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
        # not its `statistics_methods`, which would be those of the whole process
        _check(self.real is None, 'a history has two states')
        names = ('_log_history', '_count_history')
        logs, counts = (state[name].real if name in state else [] for name in names)
        self.real = HistoryBuffer(logs, counts, state.get('max_length', 1_000_000))


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    array = _Array()
    array.__setstate__((1, (), dtype, False, data))
    return array.real[()]


def _method(owner: type, name: str) -> None:
    """Stands for ``getattr``: a history names its own methods, which are dropped."""
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
for _core in ('numpy.core', 'numpy._core'):  # of numpy 1 and 2
    _NAMES[f'{_core}.multiarray._reconstruct'] = lambda *_: _Array()
    _NAMES[f'{_core}.multiarray.scalar'] = _scalar


def _versions(metadata: Any) -> dict[str, dict[str, int]]:
    """Of the ``_metadata`` of a state dict what modules read: their versions."""
    entries = dict.items(metadata) if isinstance(metadata, dict) else ()
    found = {key: dict.get(e, 'version') for key, e in entries if isinstance(e, dict)}
    return {key: dict(version=v) for key, v in found.items() if type(v) is int}


def _replaced(value: Any, memo: dict[int, tuple]) -> Any:
    """The value, in which what stand-ins stand for has taken their place."""
    if isinstance(value, (_Array, _History)):
        return value.real
    if type(value) not in (dict, OrderedDict, list, tuple):
        return value
    if id(value) not in memo:
        memo[id(value)] = value, value  # the first keeps it alive, and its id unique
        if type(value) is OrderedDict:
            # attributes of the file's choice would hide its methods
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


# within `safely` alone: a list that was declared to torch holds in all threads
unpickler._get_user_allowed_globals = _allowed


def safely(load: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call one of torch's functions that load a file, with its safe loader."""
    _thread.names = _NAMES
    try:
        return _replaced(load(*args, **kwargs, weights_only=True), {})
    finally:
        del _thread.names

"""Checkpoints are read safely and loaded strictly, or refused with an error."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import struct
import threading
import types
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdist._startup import _COMPLETIONS
from mmdist.checkpoint import load_checkpoint, load_strictly


def net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_weights_are_loaded_also_from_within_ddp():
    source, target = net(), net()
    state = {f'module.{k}': v for k, v in source.state_dict().items()}
    load_strictly(target, dict(state_dict=state), 'a.pth')
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_every_key_that_does_not_fit_is_named_up_to_ten_of_a_sort():
    state = net(4).state_dict()
    state |= {f'x{i:02}': torch.ones(1) for i in range(12)}
    state.pop('0.bias')
    with pytest.raises(RuntimeError) as error:
        load_strictly(net(), state, 'a.pth')
    for words in (
        *('1 missing in the file:\n    0.bias', 'size mismatch for 0.weight'),
        *('12 in the file, but not in the model:\n    x00', '`teacher.config`'),
        'x09\n    ... and 2 more',
    ):
        assert words in str(error.value)
    assert 'x10' not in str(error.value)


@pytest.mark.parametrize(
    'content',
    [b'', b'no checkpoint', b'PK\x03\x04', b'hello', b'error', b'q', b'\x85', None],
)
def test_a_damaged_file_says_so(tmp_path, content):
    path = tmp_path / 'damaged.pth'
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(RuntimeError, match='damaged, truncated or not a checkpoint'):
        load_checkpoint(str(path))


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class AttributeThief:
    """Asks for an attribute that no checkpoint needs."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_of_getattr_only_the_history_buffers_methods_are_given_out(tmp_path):
    path = str(tmp_path / 'thief.pth')
    torch.save(dict(x=AttributeThief()), path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        load_checkpoint(path)


def test_only_mmengines_loader_knows_the_classes_of_mmengine(tmp_path):
    """What torch.load reads does not change; the onedl fork has its own list too."""
    path = str(tmp_path / 'a.pth')
    torch.save(dict(history=HistoryBuffer([1.0], [1])), path)
    known = set(torch.serialization.get_safe_globals())
    for _ in range(2):
        read = CheckpointLoader.load_checkpoint(path, map_location='cpu')
        assert read['history'].current() == 1
        assert set(torch.serialization.get_safe_globals()) == known
        assert HistoryBuffer not in known and getattr not in known
        with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
            torch.load(path)


def test_what_mmengine_saves_is_read_as_it_was(tmp_path):
    """By mmengine's loader too, which can be the only one that is called."""
    path = str(tmp_path / 'a.pth')
    arrays = [
        np.arange(6).reshape(2, 3).T, np.array([True, False]), np.ones(2, 'f4'),
        np.zeros(0), np.uint8(7), np.array(3.5), np.int64(-3),
    ]  # fmt: skip
    history = HistoryBuffer([1.0, 2.0], [1, 1], max_length=9)
    history.update(3.0, 2)
    content = dict(arrays=(arrays, {'a': arrays}), log=[history, history])
    torch.save(content | dict(state_dict=net().state_dict()), path)
    for load in (load_checkpoint, CheckpointLoader.load_checkpoint):
        read = load(path)
        # modules need the versions to convert older weights
        assert read['state_dict']._metadata['1'] == dict(version=2)
        for found in (read['arrays'][0], read['arrays'][1]['a']):
            for expected, value in zip(arrays, found, strict=True):
                assert type(value) is type(expected) and value.dtype == expected.dtype
                np.testing.assert_array_equal(value, expected)
        log = read['log'][0]
        assert type(log) is HistoryBuffer and log is read['log'][1]
        assert log.max_length == 9
        for expected, value in zip(history.data, log.data, strict=True):
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)
        log.update(1.0)


# ---- malicious files; the letters are opcodes of pickle's protocol 2 -----------------


def glob(name: str) -> bytes:
    return 'c{}\n{}\n'.format(*name.rsplit('.', 1)).encode()


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value)) + value.encode()


def number(value: int) -> bytes:
    return b'J' + struct.pack('<i', value)


def pack(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def entries(**items: bytes) -> bytes:
    return b'}(' + b''.join(text(key) + value for key, value in items.items()) + b'u'


def of_bytes(value: bytes) -> bytes:
    return glob('_codecs.encode') + pack(text(value.decode()), text('latin1')) + b'R'


def write(path, body: bytes) -> str:
    torch.save(0, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, 'w') as file:
        for name, part in parts.items():
            new = b'\x80\x02' + body + b'.'
            file.writestr(name, new if name.endswith('data.pkl') else part)
    return str(path)


FALSE, TRUE, NONE = b'\x89', b'\x88', b'N'
CORE = f'numpy.{"_" * (np.__version__ >= "2")}core.multiarray'
BARE = glob(f'{CORE}._reconstruct') + pack(
    glob('numpy.ndarray'), pack(number(0)), of_bytes(b'b')
)


def dtype(code: str) -> bytes:
    return glob('numpy.dtype') + pack(text(code), FALSE, TRUE) + b'R'


def state(size: int, code: bytes, data: bytes) -> bytes:
    return pack(number(1), pack(number(size)), code, FALSE, of_bytes(data)) + b'b'


ARRAY = BARE + b'Rq\x02' + state(1000, dtype('f8'), b'A' * 8000)
AGAIN = b'h\x02' + state(1, dtype('f8'), b'B' * 8)
ENLARGED = pack(
    number(3), text('|'), NONE, NONE, NONE, number(4_000_000), number(1), number(0)
)
ATTACKS = dict(
    reads_past_a_buffer=dict(
        a=BARE + b'R' + state(1, dtype('V8') + b'q\x01', b'A' * 8),
        b=b'h\x01' + ENLARGED + b'b',
    ),
    pointers_from_bytes=dict(
        a=glob('numpy.ndarray')
        + pack(
            pack(number(1)), text('O'),
            glob('builtins.bytearray') + pack(of_bytes(b'A' * 8)) + b'R',
        )
        + b'R'
    ),
    view_of_freed_memory=dict(
        a=ARRAY,
        b=glob('numpy.ndarray') + pack(pack(number(9)), text('f8'), b'h\x02') + b'R',
        c=AGAIN,
    ),
    the_same_by_torch=dict(
        a=ARRAY,
        b=glob('torch._utils._rebuild_device_tensor_from_numpy')
        + pack(b'h\x02', glob('torch.float64'), text('cpu'), FALSE)
        + b'R',
        c=AGAIN,
    ),
    a_second_state=dict(a=ARRAY, b=AGAIN),
    larger_than_its_buffer=dict(a=BARE + b'R' + state(9, dtype('f8'), b'A' * 8)),
    objects=dict(a=BARE + b'R' + state(1, dtype('O8'), b'A' * 8)),
    big_endian=dict(
        a=dtype('f8') + pack(number(3), text('>')) + b'b'
    ),
)  # fmt: skip


@pytest.mark.parametrize('attack', ATTACKS)
def test_no_array_of_a_file_reaches_foreign_memory(tmp_path, attack):
    path = write(tmp_path / 'good.pth', entries(state_dict=b'}', a=ARRAY))
    assert load_checkpoint(path)['a'].shape == (1000,)
    path = write(tmp_path / 'a.pth', entries(state_dict=b'}', **ATTACKS[attack]))
    with pytest.raises(RuntimeError, match='The loader says'):
        load_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(path)


@pytest.mark.parametrize(
    'metadata', [number(3), entries(**{'0': number(3)})], ids=['no dict', 'of none']
)
def test_attributes_of_a_state_dict_do_not_hide_its_methods(tmp_path, metadata):
    hidden = entries(keys=number(1), items=number(1), _metadata=metadata)
    body = glob('collections.OrderedDict') + b')R' + hidden + b'b'
    checkpoint = load_checkpoint(write(tmp_path / 'a.pth', entries(state_dict=body)))
    with pytest.raises(RuntimeError, match='6 missing in the file'):
        load_strictly(net(), checkpoint, 'a.pth')


@pytest.mark.parametrize(
    'change',
    [
        torch.Tensor.to_sparse,
        lambda x: x.to('meta'),
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        *(
            functools.partial(torch.Tensor.to, dtype=kind)
            for kind in (torch.int64, torch.uint8, torch.bool, torch.complex64)
        ),
    ],
)
def test_weights_that_are_no_dense_floats_are_refused(change):
    state = dict(net().state_dict())
    state['0.weight'] = change(state['0.weight'])
    with pytest.raises(RuntimeError, match=r'cannot have:\n *0\.weight: '):
        load_strictly(net(), state, 'a.pth')


@pytest.mark.parametrize('value', ['max', None])
def test_a_file_does_not_change_the_statistics_of_the_process(tmp_path, value):
    kind = 'mmengine.logging.history_buffer.HistoryBuffer'
    method = glob('builtins.getattr') + pack(glob(kind), text('max')) + b'R'
    method = method if value else NONE
    log = (
        glob(kind) + b')\x81' + entries(statistics_methods=entries(mean=method)) + b'b'
    )
    load_checkpoint(write(tmp_path / 'a.pth', entries(state_dict=b'}', log=log)))
    assert HistoryBuffer([1.0, 3.0], [1, 1]).statistics('mean') == 2


def test_what_the_user_declared_stays_declared(tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(dict(a=np.ones(2)), path)
    with torch.serialization.safe_globals([np.ndarray, np.dtype]):
        for load in (load_checkpoint, CheckpointLoader.load_checkpoint):
            assert load(path)['a'].sum() == 2
        assert {np.ndarray, np.dtype} <= {*torch.serialization.get_safe_globals()}


def test_threads_do_not_decide_for_each_other(tmp_path):
    """One may run code, the others not; each reads what mmengine saves."""
    good, evil = str(tmp_path / 'a.pth'), str(tmp_path / 'evil.pth')
    logs = [HistoryBuffer([float(i)] * 50, [1] * 50) for i in range(20)]
    torch.save(dict(state_dict={}, logs=logs), good)
    torch.save(dict(state_dict={}, meta=Exploit(str(tmp_path / 'ran'))), evil)
    failed = []

    def repeat(work) -> None:
        for _ in range(20):
            try:
                work()
            except Exception as error:
                failed.append(error)

    def refused() -> None:
        with pytest.raises(RuntimeError, match='safe loader refuses'):
            load_checkpoint(evil)

    work = [functools.partial(load_checkpoint, good, flag) for flag in (True, False)]
    threads = [threading.Thread(target=repeat, args=(x,)) for x in (*work, refused)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not (tmp_path / 'ran').exists()
    assert not [name for name in os.environ if 'ONLY_LOAD' in name]


def test_a_url_is_read_as_safely(tmp_path, monkeypatch):
    """mmengine itself reads URLs without torch's safe loader."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    torch.save(net().state_dict(), tmp_path / 'a.pth')
    torch.save(dict(meta=Exploit(str(tmp_path / 'ran'))), tmp_path / 'evil.pth')
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)
    )
    with http.server.HTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/'
        assert '0.bias' in load_checkpoint(url + 'a.pth')
        with pytest.raises(RuntimeError, match='safe loader refuses'):
            load_checkpoint(url + 'evil.pth')
        with pytest.raises(RuntimeError, match=r'none\.pth.*404'):
            load_checkpoint(url + 'none.pth')
        server.shutdown()
    assert not (tmp_path / 'ran').exists()


def test_the_loader_of_the_onedl_fork_is_left_alone():
    """It reads its own and other checkpoints as it always did."""
    loader = types.SimpleNamespace(load_checkpoint=classmethod(lambda *_: 'theirs'))
    before = loader.load_checkpoint
    fork = types.SimpleNamespace(CheckpointLoader=loader, get_torch_safe_globals=list)
    _COMPLETIONS['mmengine.runner.checkpoint'](fork)
    assert loader.load_checkpoint is before
    assert fork.get_torch_safe_globals is list


@pytest.mark.parametrize('value', ['1', '0'])
@pytest.mark.parametrize('name', ['FORCE_NO_WEIGHTS', 'FORCE_WEIGHTS'])
def test_torchs_variables_allow_nothing(tmp_path, monkeypatch, name, value):
    """The variable that forbids code is obeyed, and named in the error."""
    path, trace = str(tmp_path / 'evil.pth'), tmp_path / 'ran'
    torch.save(net().state_dict(), tmp_path / 'a.pth')
    torch.save(dict(state_dict={}, meta=Exploit(str(trace))), path)
    monkeypatch.setenv(f'TORCH_{name}_ONLY_LOAD', value)
    assert '0.bias' in load_checkpoint(str(tmp_path / 'a.pth'))
    with pytest.raises(RuntimeError, match=r'teacher\.weights_only=False'):
        load_checkpoint(path)
    assert not trace.exists()
    if (name, value) == ('FORCE_WEIGHTS', '1'):
        with pytest.raises(RuntimeError, match='unset TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
            load_checkpoint(path, weights_only=False)
    else:
        load_checkpoint(path, weights_only=False)
        assert trace.exists()


# ---- odd contents --------------------------------------------------------------------


@pytest.mark.parametrize(
    'content', [[1], 7, 'x', None, torch.zeros(3), {1: torch.zeros(1)}], ids=repr
)
def test_what_is_no_dict_of_weights_is_refused(tmp_path, content):
    for what, value in dict(
        content=content, state_dict={'state_dict': content}
    ).items():
        torch.save(value, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match=f'{what}.* must be a dict with names as'):
            load_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize(
    'meta',
    [
        [1], 'x', 3, {1: 2},
        *(dict(dataset_meta=data) for data in ([1], 'x', 5, {1: 2})),
        *(
            dict(dataset_meta=dict(classes=names))
            for names in (5, [1, 2], b'ab', {'a': 0}, {'a', 'b'}, torch.zeros(3))
        ),
        dict(CLASSES={'a', 'b'}),
    ],
)  # fmt: skip
def test_what_is_no_list_of_class_names_is_refused(tmp_path, meta):
    torch.save(dict(state_dict={}, meta=meta), tmp_path / 'a.pth')
    with pytest.raises(
        ValueError, match=r'not a usable checkpoint: .* must be .*, got'
    ):
        load_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('kind', [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_loaded(kind):
    model = net()
    state = {key: value.to(kind) for key, value in net().state_dict().items()}
    load_strictly(model, state, 'a.pth')
    assert torch.equal(model[0].weight, state['0.weight'].float())

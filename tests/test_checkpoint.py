"""Checkpoints: read safely, loaded strictly, each with what can go wrong."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdist.checkpoint import load_checkpoint, load_strictly


def net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_weights_are_loaded_also_from_within_ddp():
    source, target = net(), net()
    state = {f'module.{k}': v for k, v in source.state_dict().items()}
    load_strictly(target, dict(state_dict=state), 'a.pth')
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_every_key_that_does_not_fit_is_named():
    state = net(4).state_dict()
    state['stranger'] = state.pop('0.bias')
    with pytest.raises(RuntimeError) as error:
        load_strictly(net(), state, 'a.pth')
    message = str(error.value)
    assert '1 missing in the file:\n    0.bias' in message
    assert '1 in the file, but not in the model:\n    stranger' in message
    assert 'size mismatch for 0.weight' in message
    assert '`teacher.config`' in message


def test_at_most_ten_keys_of_a_sort_are_listed():
    state = {**net().state_dict(), **{f'x{i:02}': torch.ones(1) for i in range(12)}}
    with pytest.raises(RuntimeError, match=r'x09\n    \.\.\. and 2 more') as error:
        load_strictly(net(), state, 'a.pth')
    assert 'x10' not in str(error.value)


def test_a_missing_file_says_from_where_it_was_looked_for():
    with pytest.raises(FileNotFoundError, match='working directory'):
        load_checkpoint('no/such.pth')


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04 cut off'])
def test_a_damaged_file_says_so(tmp_path, content):
    path = tmp_path / 'damaged.pth'
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match='damaged, cut off or no checkpoint'):
        load_checkpoint(str(path))


def test_a_truncated_checkpoint_says_so(tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match='damaged, cut off or no checkpoint'):
        load_checkpoint(str(path))


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run_unless_asked_for(tmp_path):
    path, trace = str(tmp_path / 'evil.pth'), tmp_path / 'ran'
    torch.save(dict(state_dict={}, meta=Exploit(str(trace))), path)
    with pytest.raises(RuntimeError, match=r'teacher\.weights_only=False'):
        load_checkpoint(path)
    assert not trace.exists()
    load_checkpoint(path, weights_only=False)
    assert trace.exists()


class AttributeThief:
    """Asks for an attribute that no checkpoint needs."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_of_getattr_only_the_history_buffers_methods_are_given_out(tmp_path):
    path = str(tmp_path / 'thief.pth')
    torch.save(dict(x=AttributeThief()), path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        load_checkpoint(path)


def test_checkpoints_of_mmengine_are_read_safely(tmp_path):
    path = str(tmp_path / 'a.pth')
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(message_hub=history, meta=np.float64(3.0)), path)
    read = load_checkpoint(path)
    assert read['message_hub'].mean() == 1.5
    assert read['meta'] == 3.0


def test_only_mmengines_loader_knows_the_classes_of_mmengine(tmp_path):
    """What torch.load reads is changed for nobody; the onedl fork has a list too."""
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


@pytest.mark.parametrize('name', ['FORCE_NO_WEIGHTS', 'FORCE_WEIGHTS'])
@pytest.mark.parametrize('value', ['1', '0'])
def test_torchs_variables_do_not_decide_what_is_safe(
    tmp_path, monkeypatch, name, value
):
    """torch refuses to read anything if both are set."""
    path, trace = str(tmp_path / 'evil.pth'), tmp_path / 'ran'
    torch.save(net().state_dict(), tmp_path / 'a.pth')
    torch.save(dict(state_dict={}, meta=Exploit(str(trace))), path)
    variable = f'TORCH_{name}_ONLY_LOAD'
    monkeypatch.setenv(variable, value)
    assert '0.bias' in load_checkpoint(str(tmp_path / 'a.pth'))
    with pytest.raises(RuntimeError, match=r'teacher\.weights_only=False'):
        load_checkpoint(path)
    assert not trace.exists()
    load_checkpoint(path, weights_only=False)
    assert trace.exists()
    assert {k: v for k, v in os.environ.items() if 'ONLY_LOAD' in k} == {
        variable: value
    }

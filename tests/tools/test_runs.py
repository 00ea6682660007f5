"""How tools are run in processes of their own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / 'tools'))

import runs


@pytest.mark.parametrize('name', runs.LIBRARIES)
def test_what_is_imported_ahead_exists(name):
    importlib.import_module(name)  # a fork server does not say what it does not find


def test_a_tool_that_fails_says_the_end_of_its_output(tmp_path):
    log = tmp_path / 'train.log'
    with (
        pytest.raises(SystemExit, match=r'(?s)no-config\.py.*train\.py stopped with'),
        runs.tool('train.py', ['no-config.py'], log) as process,
    ):
        process.join()
    assert 'no-config.py' in log.read_text()


def test_a_tool_is_ended_when_its_block_is_left(tmp_path):
    with runs.tool('train.py', ['no-config.py'], tmp_path / 'train.log') as process:
        assert process.is_alive()
    assert not process.is_alive()

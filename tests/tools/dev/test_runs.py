"""Tools that run in their own processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.dev import runs

ROOT = Path(__file__).resolve().parents[3]
FAILS = 'print("what is wrong")\nraise SystemExit(3)'
COMPUTES = """
import os, pathlib
pathlib.Path('pid').write_text(str(os.getpid()))
while True: pass
"""
STARTS = """
import sys
from pathlib import Path
from tools.dev import runs
runs.TOOLS = Path.cwd()
with runs.tool('tool.py', [], Path('log')) as process:
    process.join()
"""


@pytest.mark.parametrize('name', runs.LIBRARIES)
def test_what_is_imported_ahead_exists(name):
    assert importlib.util.find_spec(name)  # a fork server ignores missing modules


def test_a_tool_that_fails_shows_the_end_of_its_output(tmp_path, monkeypatch):
    (tmp_path / 'tool.py').write_text(FAILS)
    monkeypatch.setattr(runs, 'TOOLS', tmp_path)
    message = r'(?s)what is wrong.*tool\.py stopped with exit status 3'
    with (
        pytest.raises(SystemExit, match=message),
        runs.tool('tool.py', [], tmp_path / 'log') as process,
    ):
        process.join()


def test_a_tool_is_ended_when_its_block_is_left(tmp_path, monkeypatch):
    (tmp_path / 'tool.py').write_text(COMPUTES)
    monkeypatch.setattr(runs, 'TOOLS', tmp_path)
    with runs.tool('tool.py', [], tmp_path / 'log') as process:
        assert process.is_alive()
    assert not process.is_alive()


@pytest.mark.slow
def test_a_tool_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / 'tool.py').write_text(COMPUTES)
    environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', STARTS]
    process = subprocess.Popen(command, cwd=tmp_path, env=environ)
    file = tmp_path / 'pid'
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait()
    end = time.monotonic() + 30
    while Path('/proc', file.read_text()).exists():
        if time.monotonic() > end:
            os.kill(int(file.read_text()), signal.SIGKILL)
            pytest.fail('it goes on computing')
        time.sleep(0.05)

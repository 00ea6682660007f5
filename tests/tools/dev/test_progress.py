"""The progress line, on a terminal and in a file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from tools.dev import progress as module
from tools.dev import runs
from tools.dev.progress import Progress

NAME = 'a step with a name that is far too long for the terminal ' * 3


class Clock:
    """A clock that moves only when set."""

    time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, 'monotonic', clock)
    return clock


class Terminal:
    """A pseudo-terminal of 60 columns and its screen."""

    columns = 60

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        size = struct.pack('HHHH', 24, self.columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        self.stream = os.fdopen(slave, 'w')

    def screen(self) -> list[str]:
        """Lines written since the last call, as they appear on the screen."""
        # a read can return early, so read up to a mark
        self.stream.write('\0')
        self.stream.flush()
        written = b''
        while not written.endswith(b'\0'):
            written += os.read(self.master, 65536)
        lines = []
        for line in written[:-1].decode().replace('\r\n', '\n').split('\n'):
            seen = ''
            for text in line.split('\r'):
                seen = text + seen[len(text) :]
                assert len(seen) < self.columns  # or it would wrap
            lines.append(seen.rstrip())
        return lines


def test_a_terminal_has_one_line_that_fits(clock):
    terminal = Terminal()
    with Progress('env', 3, terminal.stream) as progress:
        progress.show(NAME, 90)
        (line,) = terminal.screen()
        assert line == f'[env] 0/3 {NAME}'[:36] + '; 0:00, about 1:30 left'
        progress.show(NAME, 90)
        clock.time += 61
        progress.show('mmcv', 9)
        assert terminal.screen() == ['[env] 0/3 mmcv; 1:01, about 0:09 left']
        progress.done('mmcv: done')
        progress.show('check', 1)
        assert terminal.screen() == ['[env] 1/3 check; 1:01, about 0:01 left']
        progress.show('check', 1)
        progress.say('file by file')  # it stays above the line
        progress.show('check', 1)
        stays, line = terminal.screen()
        assert stays == '[env] file by file' and line.startswith('[env] 1/3 check')
    assert terminal.screen() == ['', '']  # what follows starts a new line


def test_a_file_has_a_line_for_each_step_and_one_a_minute(clock):
    stream = io.StringIO()
    with Progress('env', 2, stream) as progress:
        for _ in range(150):
            progress.show('mmcv', 100)
            clock.time += 1
        progress.done('mmcv: done')
        progress.show('check', 20)
        clock.time += 1
        progress.done('check: done')
    assert stream.getvalue().splitlines() == [
        '[env] 0/2 mmcv; 1:00, about 1:40 left',
        '[env] 0/2 mmcv; 2:00, about 1:40 left',
        '[env] 1/2 mmcv: done; 2:30',
        '[env] 2/2 check: done; 2:31',
    ]


LOG = """\
mmengine - INFO - Epoch(train)  [1][10/50]  lr: 1.0e-03  eta: 0:01:40  time: 0.5
mmengine - INFO - Epoch(val)    [1][ 5/25]    eta: 0:00:07  time: 0.1
mmengine - INFO - Epoch(train)  [3][25/50]  lr: 1.0e-03  eta: 1:00:05  time: 0.5
mmengine - INFO - Saving checkpoint
"""
ITERATIONS = 'Iter(train) [ 50/400]  base_lr: 1e-2 lr: 1e-2  eta: 0:00:35  time: 0.1\n'


def test_the_log_of_a_training_tells_how_far_it_is():
    assert runs.share_done('') == 0
    assert runs.share_done(LOG, 4) == 2.5 / 4
    assert runs.share_done(LOG[: LOG.index('Epoch(train)  [3]')], 4) == 0.05
    assert runs.share_done(ITERATIONS) == 0.125

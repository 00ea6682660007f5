"""How far a command is, in one line; make_env.py needs the standard library alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

EVERY = 60  # seconds between two lines where there is no terminal


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes}:{seconds:02}'


class Plan:
    """Steps that are done one after the other, and how long the rest of them takes.

    Args:
        expected: The seconds of each step, as they were on some machine.
        now: The clock.
    """

    def __init__(
        self, expected: Mapping[str, float], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.waiting = dict(expected)
        self.now = now
        self.pace = 1.0  # this machine's time over that of the other

    def begin(self, step: str) -> None:
        self.expected = self.waiting.pop(step)
        self.began = self.now()

    def spent(self) -> float:
        """Seconds since the current step began."""
        return self.now() - self.began

    def left(self, eta: float | None = None) -> float:
        """Seconds that are left of all steps.

        Args:
            eta: Those of the current step, if it says so itself. The later steps are
                then expected to be as fast or slow as this one.
        """
        spent = self.spent()
        if eta is None:
            # what takes longer than expected is taken to be nearly done
            eta = max(self.expected * self.pace - spent, spent / 10)
        else:
            self.pace = (spent + eta) / self.expected
        return eta + self.pace * sum(self.waiting.values())


class Progress:
    """A line that is rewritten in place; where there is no terminal, a few plain ones.

    In a file or a pipe each finished step is a line, and while a step runs there is one
    a minute. Leave its block before anything else is printed.

    Args:
        name: What the line begins with.
        total: The number of steps.
        stream: Where it is written; standard output if omitted.
        now: The clock.
    """

    def __init__(
        self,
        name: str,
        total: int,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.finished = name, total, 0
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.now = now
        self.began = self.printed = now()
        self.dirty = False  # the cursor is behind a line that is not ended

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        if self.dirty:
            self._write('\n')

    def elapsed(self) -> float:
        """Seconds since all of it began."""
        return self.now() - self.began

    def show(self, text: str, left: float | None = None) -> None:
        """What runs now, and the seconds that are left of all, if known."""
        rest = '' if left is None else f', about {clock(left)} left'
        if self.live:
            self._rewrite(text, rest)
        elif self.now() - self.printed >= EVERY:
            self._print(text, rest)

    def done(self, text: str) -> None:
        """One more step is finished; on a terminal only its number is seen."""
        self.finished += 1
        if not self.live:
            self._print(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.dirty:
            self._write('\r' + ' ' * self._width() + '\r')
        self._write(f'[{self.name}] {text}\n')

    def _line(self, text: str, rest: str = '') -> tuple[str, str]:
        head = f'[{self.name}] {self.finished}/{self.total} {text}'
        return head, f'; {clock(self.elapsed())}{rest}'

    def _print(self, text: str, rest: str = '') -> None:
        self.printed = self.now()
        self._write(''.join(self._line(text, rest)) + '\n')

    def _rewrite(self, text: str, rest: str) -> None:
        # what does not fit is cut off before the times; spaces hide the line before
        head, tail = self._line(text, rest)
        width = self._width()
        line = head[: max(0, width - len(tail))] + tail
        self._write(f'\r{line[:width]:{width}}')

    def _width(self) -> int:
        # in the last column some terminals begin a new line
        return (os.get_terminal_size(self.stream.fileno()).columns or 80) - 1

    def _write(self, text: str) -> None:
        self.dirty = not text.endswith(('\n', '\r'))
        self.stream.write(text)
        self.stream.flush()

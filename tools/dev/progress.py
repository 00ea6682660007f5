"""Progress of a command, in one line; standard library only."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TextIO

EVERY = 60  # seconds between two lines where there is no terminal


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes}:{seconds:02}'


class Progress:
    """A progress line, rewritten in place; without a terminal, a few plain lines.

    A file or a pipe gets a line for each finished step, and one line a minute while a
    step runs. Leave the `with` block before you print anything else.

    Args:
        name: The start of the line.
        total: The number of steps.
        stream: Where to write; standard output if omitted.
    """

    def __init__(self, name: str, total: int, stream: TextIO | None = None) -> None:
        self.name, self.total, self.finished = name, total, 0
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.began = self.printed = monotonic()
        self.dirty = False  # the cursor is after an unfinished line

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        if self.dirty:
            self._write('\n')

    def elapsed(self) -> float:
        """Seconds since the start of all steps."""
        return monotonic() - self.began

    def show(self, text: str, left: float | None = None) -> None:
        """Show what is running, and the seconds left for all steps, if known."""
        head, tail = self._parts(text)
        tail += '' if left is None else f', about {clock(left)} left'
        if self.live:
            width = self._width()  # cut off before the times, padded over the last line
            line = head[: max(0, width - len(tail))] + tail
            self._write(f'\r{line[:width]:{width}}')
        elif monotonic() - self.printed >= EVERY:
            self.printed = monotonic()
            self._write(f'{head}{tail}\n')

    def done(self, text: str) -> None:
        """Count one more finished step; a terminal shows only the number."""
        self.finished += 1
        if not self.live:
            self.printed = monotonic()
            self._write(''.join(self._parts(text)) + '\n')

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.dirty:
            self._write('\r' + ' ' * self._width() + '\r')
        self._write(f'[{self.name}] {text}\n')

    def _parts(self, text: str) -> tuple[str, str]:
        head = f'[{self.name}] {self.finished}/{self.total} {text}'
        return head, f'; {clock(self.elapsed())}'

    def _width(self) -> int:
        # some terminals begin a new line at the last column
        return (os.get_terminal_size(self.stream.fileno()).columns or 80) - 1

    def _write(self, text: str) -> None:
        self.dirty = not text.endswith(('\n', '\r'))
        self.stream.write(text)
        self.stream.flush()

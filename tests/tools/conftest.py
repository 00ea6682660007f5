"""Run tools as a user does, but in the test's process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'


class Ran(NamedTuple):
    """The result of a tool."""

    status: int
    out: str  # what it printed
    said: str  # its error and what it printed to stderr, in a line

    @property
    def text(self) -> str:
        """What it printed, its lines joined."""
        return ' '.join(self.out.split())


@pytest.fixture
def run_tool(monkeypatch, capsys, tmp_path):
    """Run a tool by its name in an empty directory; it must end with ``status``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOOLS)

    def run(name: str, *args: str, status: int | None = 0) -> Ran:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *args])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        except SystemExit as stopped:
            code = stopped.code or 0
        out, err = capsys.readouterr()
        if isinstance(code, str):
            code, err = 1, f'{code} {err}'
        assert status in (None, code), f'{out}\n{err}'
        return Ran(code, out, ' '.join(err.split()))

    return run


@pytest.fixture
def tools(monkeypatch):
    """Makes the tools importable."""
    monkeypatch.syspath_prepend(TOOLS)

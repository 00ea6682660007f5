"""What a part of `tools/gpu_check.py` is given, and how it reports."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
if not CUDA:
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported
NO_GPU = 'torch finds no CUDA device'


class Skip(Exception):
    """A part does not run here; the message says why."""


class Run(argparse.Namespace):
    """What a part is given, and where it reports to."""

    small: bool
    seconds: float
    work: Path
    out: Path
    results: int

    def row(self, table: str, name: str, **cells) -> None:
        """Report a row of a table; one of the same name is replaced."""
        # a column may be any text
        cells = {key.replace('_', ' ').strip(): value for key, value in cells.items()}
        if self.small:  # a goal is for the usual sizes
            cells = {
                key: x['value'] if isinstance(x, dict) and 'goal' in x else x
                for key, x in cells.items()
            }
        self.write(dict(table=table, name=name, cells=cells))

    def write(self, what: dict) -> None:
        os.write(self.results, (json.dumps(what) + '\n').encode())


def right(ok: bool, value: object = '') -> dict:
    """What is right or wrong."""
    return dict(value=value, met=bool(ok))


def at_most(value: float, goal: float) -> dict:
    """What has a goal."""
    return dict(value=value, goal=f'at most {goal:g}', met=bool(value <= goal))


def at_least(value: float, goal: float) -> dict:
    return dict(value=value, goal=f'at least {goal:g}', met=bool(value >= goal))


def need_gpu(run: Run, small_will_do: bool = True) -> None:
    """Skip what measures a GPU, unless it is only tried."""
    if CUDA or (run.small and small_will_do):
        return
    raise Skip(NO_GPU + ('; --small tries it on the CPU' if small_will_do else ''))

"""What a training run left: its log, its model's size, and how it failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


def read_log(folder: Path) -> list[dict]:
    """The scalars that the runs in a work dir have logged, the first run first."""
    return [
        json.loads(line)
        for file in sorted(folder.glob('*/vis_data/scalars.json'))
        for line in file.read_text().splitlines()
        if line.endswith('}')
    ]


def count_parameters(state_dict: Mapping[str, Tensor]) -> int:
    """How many parameters a checkpoint's model has, without those of `distill`."""
    return sum(
        value.numel()
        for key, value in state_dict.items()
        if not key.startswith('distill.') and not key.endswith(BUFFERS)
    )


def failure(what: str, exit_status: int, log_file: Path) -> str:
    """The message for a run that failed, with the end of what it printed."""
    tail = '\n'.join(log_file.read_text().splitlines()[-15:])
    return (
        f'{tail}\n{what} stopped with exit status {exit_status}; all of its output is '
        f'in {log_file}. What is finished is kept: run this again.'
    )
